"""Errors that end a run with one clear line. Anything else that escapes is a bug and keeps its traceback."""

from __future__ import annotations


class TorlError(Exception):
    """Something a user can mend: the message says the value, what was expected and the remedy, on one line."""


class ConfigError(TorlError):
    """A setting is unknown, out of range or contradicts another one."""


class DataError(TorlError):
    """A data file is missing, empty or not in a known format."""


class GenerationError(TorlError):
    """A generation failed on every try."""


class StaleServers(GenerationError):
    """Every server holds weights of another version than may be sampled from; a weight sync mends it."""


class ToolFault(TorlError):
    """A tool's infrastructure failed on every try; the policy never sees it."""


class SandboxFault(ToolFault):
    """The sandbox could not say how a program ended."""


class ServerError(TorlError):
    """A server did not come up, died, or gave an answer that contradicts itself or the trainer."""


class WeightSyncError(TorlError):
    """A weight sync was refused, timed out, or left a server with other weights than were sent."""


class ServerLost(WeightSyncError):
    """A server died during a weight sync while others live; calling the sync again leaves it out."""


class CheckpointError(TorlError):
    """A checkpoint is missing, damaged or belongs to another model or layout."""


class GuardError(TorlError):
    """A rate that `guards` watches went over its limit."""


class Preempted(Exception):
    """SIGTERM or SIGUSR1 arrived while a step was being collected: the step is dropped, the run is saved."""
