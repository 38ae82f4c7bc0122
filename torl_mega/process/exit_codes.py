"""How the processes of a run end, and how often one is started again: the same numbers on a laptop and under Slurm.

The rank program ends with DONE, ERROR or REQUEUE; `torl train` and a Slurm job (launch/common.sh) with any of the four.
"""

from __future__ import annotations

import signal

DONE = 0
ERROR = 1  # said in one line; starting again would end the same way
REQUEUE = 85  # stopped on request, after a checkpoint: the same command goes on from there
KILLED_TOO_OFTEN = 86  # ranks were killed more often than TORL_MAX_RESTARTS allows

MAX_RESTARTS = 20  # of one helper process (a side-car, the collector) in one run: more is no accident


def as_shell_code(code: int) -> int:
    """Popen's exit code as a shell and Slurm write it: 128 + N for a process that signal N ended."""
    return code if code >= 0 else 128 - code


def how_it_ended(code: int) -> str:
    """Popen's exit code in words, e.g. `was killed by SIGKILL`."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
