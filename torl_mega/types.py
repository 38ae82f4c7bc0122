"""The records that flow through a step, in the order in which they come to be.

    Problem -> Prompt -> (Turn, Turn, ...) -> Trajectory -> Reward -> Group -> Sample -> TrainSample

Every record is frozen and complete when built: a later stage makes a new record instead of filling in a field.
Shapes stand on the fields:  P prompt tokens, T tokens of a turn / a sequence, O observation tokens, G group size.
This module imports nothing of torch, Megatron or SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a data set, before it is templated for a model."""

    problem_id: str  # stable over runs: "<source>/<row>", and "@<k>" for the k-th further file of a run
    problem: str
    answer: str  # the gold answer, as text
    source: str  # data set or benchmark the row came from, e.g. "aime24"
    # what data.columns keeps for reward and tools
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem in the form the policy sees: templated and encoded exactly once."""

    problem: Problem
    token_ids: tuple[int, ...]  # [P]


# ------------------------------------------------------------------------------------------------ sandbox


class ExecutionStatus(StrEnum):
    """How a program ended, reported beside its output and never parsed from it."""

    OK = "ok"  # return code 0
    ERROR = "error"  # uncaught exception or non-zero exit; `return_code` says which
    TIMEOUT_WALL = "timeout_wall"
    TIMEOUT_CPU = "timeout_cpu"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    SIGNAL = "signal"  # killed by a signal of its own making; `return_code` is minus the signal number
    INFRA = "infra"  # the sandbox failed, not the program: retried, counted, never shown to the model


@dataclass(frozen=True, slots=True)
class ExecutionRequest:
    """One untrusted Python program and the limits it runs under. The clocks start when the program starts."""

    code: str
    stdin: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)  # relative path -> content, laid into the working folder
    fetch_files: tuple[str, ...] = ()  # relative paths read back after the program ended
    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mb: int = 512
    output_bytes: int = 65536  # per stream; head and tail are kept


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """How one program ended and what it printed, cut to its limits."""

    status: ExecutionStatus
    return_code: int | None  # None when the program was killed by a limit
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    max_rss_mb: float
    files: Mapping[str, bytes] = field(default_factory=dict)
    message: str = ""  # what failed, for INFRA

    @classmethod
    def infra(cls, message: str) -> ExecutionResult:
        """The sandbox failed, which says nothing about the program."""
        return cls(ExecutionStatus.INFRA, None, "", "", 0.0, 0.0, 0.0, {}, message)


# ------------------------------------------------------------------------------------------------ rollout


class FinishReason(StrEnum):
    """Why one generation ended."""

    STOP_STRING = "stop_string"  # a tool call: the text ends in the stop string
    EOS = "eos"
    LENGTH = "length"
    ABORT = "abort"  # the server gave up in the middle; the tokens so far are valid


class StopReason(StrEnum):
    """Why a trajectory ended."""

    EOS = "eos"
    LENGTH = "length"  # response budget or context used up, or an observation that would not have fitted


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One continuation asked of the policy."""

    token_ids: tuple[int, ...]  # [P] everything so far: prompt, sampled tokens, observations
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int  # unique per (run, step, prompt, sample, turn); counts where the server is deterministic
    route_key: str  # requests that share it share a prefix
    stop_token_ids: tuple[int, ...] = ()  # end a generation as EOS does, beside those of the model's own files
    routes_from: int | None = (
        None  # first position whose experts are wanted, at most P - 1 after the first turn; None = none
    )


@dataclass(frozen=True, slots=True)
class Generation:
    """What a generator sampled, token for token."""

    token_ids: tuple[int, ...]  # [T] stop tokens included
    logprobs: tuple[float, ...]  # [T] log-softmax(logits / temperature) of each sampled token
    policy_versions: tuple[int, ...]  # [T] version of the weights that sampled each token
    text: str  # decoded, stop string included
    finish: FinishReason
    routes: np.ndarray | None = field(default=None, compare=False)
    """[P + T - 1 - routes_from, layers, k] the experts that each token went to; the last token has not gone through the model."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the policy wrote and the observation it got."""

    code: str  # the program, or the arguments as they were written; empty where nothing was run
    status: ExecutionStatus
    return_code: int | None
    observation: str  # the text that was inserted, fence included; in a chat, the content of the tool's message
    wall_s: float
    tool: str = "python"  # its name


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation and the observation inserted after it (empty when the turn made no call)."""

    token_ids: tuple[int, ...]  # [T] sampled
    logprobs: tuple[float, ...]  # [T]
    policy_versions: tuple[int, ...]  # [T]
    text: str
    tool_call: ToolCall | None = None
    observation_ids: tuple[int, ...] = ()  # [O] inserted, never trained
    more_calls: tuple[ToolCall, ...] = ()  # the second and later calls of one turn, in a chat
    routes: np.ndarray | None = field(default=None, compare=False)
    """[n, layers, k] the experts of the tokens that follow those of earlier turns' routes, up to the last but one of this turn."""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """All calls of the turn, in the order in which they were written."""
        return () if self.tool_call is None else (self.tool_call, *self.more_calls)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished attempt at a prompt."""

    prompt: Prompt
    sample_index: int  # 0 <= sample_index < group_size
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    times: tuple[float, ...] = field(default=(), compare=False)
    """When it began (unix s), then the seconds of each turn's generation and calls, then of its grading."""

    @property
    def response_ids(self) -> tuple[int, ...]:
        """[T] sampled and inserted tokens after the prompt, in order."""
        return tuple(i for turn in self.turns for i in (*turn.token_ids, *turn.observation_ids))

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """[T] over response_ids: True on tokens the policy sampled."""
        return tuple(b for t in self.turns for b in (*(True,) * len(t.token_ids), *(False,) * len(t.observation_ids)))

    @property
    def rollout_logprobs(self) -> tuple[float, ...]:
        """[T] over response_ids; 0.0 on inserted tokens."""
        return tuple(x for t in self.turns for x in (*t.logprobs, *(0.0,) * len(t.observation_ids)))

    @property
    def policy_versions(self) -> tuple[int, ...]:
        """[T] over response_ids; -1 on inserted tokens."""
        return tuple(v for t in self.turns for v in (*t.policy_versions, *(-1,) * len(t.observation_ids)))

    @property
    def routes(self) -> np.ndarray | None:
        """[P + T, layers, k] int16, the experts that the servers took for each token of prompt and response, -1 where none is
        known: the last sampled token and what was inserted after it. None where they were not asked for."""
        parts = [turn.routes for turn in self.turns]
        if not parts or any(part is None for part in parts):
            return None
        known = np.concatenate([part for part in parts if part is not None]).astype(np.int16)
        table = np.full((len(self.prompt.token_ids) + len(self.response_ids), *known.shape[1:]), -1, np.int16)
        table[: len(known)] = known
        return table

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """In order; at most one a turn, but in a chat."""
        return tuple(call for turn in self.turns for call in turn.tool_calls)

    @property
    def programs(self) -> tuple[ToolCall, ...]:
        """The calls that ran something: one without code, or with arguments that could not be read, ran nothing."""
        return tuple(call for call in self.tool_calls if call.code)

    @property
    def response_text(self) -> str:
        """What the policy wrote and was shown, in order; of a chat without what its template wraps around."""
        return "".join(
            t.text + ("".join(c.observation for c in t.tool_calls) if t.observation_ids else "") for t in self.turns
        )


# ------------------------------------------------------------------------------------------------ reward


class GraderStatus(StrEnum):
    """Whether an answer could be judged."""

    OK = "ok"
    NO_ANSWER = "no_answer"  # no final \boxed{}
    TIMEOUT = "timeout"  # the grader hung on this answer; counted as wrong and as grader_timeout
    FAULT = "fault"  # the grader process failed twice; counted, and the trajectory is left out


@dataclass(frozen=True, slots=True)
class Reward:
    """What a trajectory earned."""

    value: float  # what the advantage is computed from
    correct: bool
    status: GraderStatus
    extracted: str | None  # the answer that was compared
    parts: Mapping[str, float]  # named summands of `value`: {"answer": 1.0, "code_error": -0.5, ...}


@dataclass(frozen=True, slots=True)
class Group:
    """All attempts at one prompt, scored. G can be below group_size where trajectories failed and were left out."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]  # [G]
    rewards: tuple[Reward, ...]  # [G]


@dataclass(frozen=True, slots=True)
class CollectedGroups:
    """What one collection sampled and scored, in the order of its prompts."""

    groups: tuple[Group, ...]
    faults: Mapping[str, int]  # kind -> count, e.g. {"SandboxFault_retry": 2, "grader_lost": 1}
    wall_s: float


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training sequence: prompt and response as flat arrays, aligned by position.

    Worked example, prompt [7 8], sampled [1 2], observation [5], sampled [3]:
        token_ids  7 8 1 2 5 3
        loss_mask  F F T T F T
    """

    token_ids: np.ndarray  # [T] int64
    loss_mask: np.ndarray  # [T] bool, True on tokens the policy sampled (algo.train_on_observations: on the tools' too)
    rollout_logprobs: np.ndarray  # [T] float32, 0 where not sampled
    policy_versions: np.ndarray  # [T] int32, -1 where not sampled
    advantage: float
    group: int = 0  # number of its prompt's group in the step
    reward: float = 0.0  # what the advantage was computed from
    routes: np.ndarray | None = None  # [T, layers, k] int16 experts that every pass takes, -1 = the router's own choice

    @property
    def sampled(self) -> np.ndarray:
        """[T] bool, trained tokens that a server has a log-prob of."""
        return np.asarray(self.loss_mask & (self.policy_versions >= 0))


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's training data and metrics, as rank 0 shares them with every rank."""

    samples: tuple[Sample, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class TrainSample:
    """A Sample with the trainer's log-probs before the update; None where that pass was left out (algo.old_logprobs)."""

    sample: Sample
    old_logprobs: np.ndarray | None  # [T] float32, position t is log p(token t | tokens < t); 0 where not sampled
    entropy: np.ndarray | None  # [T] float32, of the distribution that token t was drawn from; 0 where not sampled
    ref_logprobs: np.ndarray | None = None  # [T] float32 under the reference; None when algo.kl_coef is 0
