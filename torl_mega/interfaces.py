"""The seams of the system. The loop and the rollout see these Protocols and never an engine.

Implementations are passed in as objects by `train.py`; nothing here has state or a default. An error that a verb does not
name is a bug and ends the run with its traceback.
Shapes:  P prompt tokens, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from torl_mega.types import (
    ExecutionRequest,
    ExecutionResult,
    Generation,
    GenerationRequest,
    Problem,
    Reward,
    Sample,
    StepBatch,
    ToolCall,
    TrainSample,
    Trajectory,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


T = TypeVar("T")


class Generator(Protocol):
    """Samples tokens of the policy."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Continues `request.token_ids` [P] until a stop string, EOS or `max_new_tokens`.

        Log-probs are in nats, of the distribution that was sampled from (after temperature), one a sampled token.
        Raises `GenerationError` when every retry failed, `StaleServers` when only a weight sync can help.
        """
        ...


class Sandbox(Protocol):
    """Runs untrusted programs."""

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        """How the program ended and what it printed. Limits are in seconds, megabytes and bytes per stream.

        Never raises for what a program does or for a sandbox that fails: the latter is the status INFRA, after retries.
        """
        ...


class ToolSession(Protocol):
    """A tool for one trajectory."""

    async def call(self, written: str) -> ToolCall:
        """Makes the call that `written` ends in: all that the policy wrote so far in this answer, observations left out.

        The result's `observation` is the text to insert, byte for byte. A call that the policy got wrong is an observation
        too; `ToolFault` is raised when the tool itself failed.
        """
        ...

    async def close(self) -> None:
        """The trajectory is over, whatever ended it."""
        ...


class Tool(Protocol):
    """What the policy may call in the middle of its answer, by text.

    `stop`: a generation that ends in one of these strings is a call.
    """

    @property
    def stop(self) -> tuple[str, ...]: ...

    def open(self, problem: Problem) -> ToolSession:
        """A session for one attempt at `problem`."""
        ...


class ChatSession(Protocol):
    """The tools of a chat model for one trajectory."""

    async def calls(self, turn: str, *, most: int) -> tuple[ToolCall, ...]:
        """Every call that stands in an assistant's whole turn, answered, in order; none is the answer to the problem. The first
        `most` are made, the others refused. Calls that the policy got wrong are answered too; `ToolFault` is raised when a
        tool itself failed."""
        ...

    async def close(self) -> None:
        """The trajectory is over, whatever ended it."""
        ...


@runtime_checkable
class ChatTool(Protocol):
    """What a chat model may call: in whole turns of the assistant, answered by messages of the template.

    `end_ids`: the tokens that close a turn; the template's own comes first.
    """

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    def open(self, problem: Problem) -> ChatSession:
        """A session for one attempt at `problem`."""
        ...

    def follow(self, calls: Sequence[ToolCall]) -> tuple[int, ...]:
        """Ids to insert after the closing token: the messages with the calls' observations, and the beginning of the assistant's
        next turn. Raises ToolFault."""
        ...


class RewardFn(Protocol):
    """Scores finished trajectories."""

    async def score(self, trajectory: Trajectory) -> Reward:
        """The reward of one trajectory, the sum of its `parts`.

        An answer that hangs is killed after its own time limit (status TIMEOUT, wrong) and delays no other. Raises nothing
        for what an answer does; where the grader failed twice the status is FAULT and the trajectory is to be left out.
        """
        ...


class Collector(Protocol):
    """Rank 0's half of a step: everything that talks to servers, sandboxes, graders and files."""

    def collect(self, step: int) -> StepBatch:
        """The samples of one step, sampled under policy version `step` (or at most `rollout.max_staleness` older), scored,
        recorded in `trajectories/`, with the step's metrics.

        Raises `Preempted` when the run is told to stop meanwhile and `StaleServers` when a weight sync must come first; the
        step is then dropped, and the next `collect` of it samples the same prompts.
        """
        ...

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Metrics of the benchmarks under policy version `step`, empty without benchmarks. Does not move the prompt cursor or
        the seeds of training. Raises as `collect` does."""
        ...

    def state(self) -> Mapping[str, Any]:
        """JSON-able: where the next `collect` goes on."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state()` was taken. Raises `DataError` when the training data or their order are other ones."""
        ...


class Share(Protocol):
    """Collective: calls `make` on rank 0 alone and gives its result, or its exception, to every rank.

    Rank 0 gets its own object back, the others an equal one; the result must be picklable.
    """

    def __call__(self, make: Callable[[], T]) -> T: ...


NamedTensor = tuple[str, "torch.Tensor"]


class WeightSink(Protocol):
    """Puts weights into every server."""

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        """Sends HF-named tensors, verifies what each server holds, then records `version` as its policy version.

        Every trainer rank calls it with its own iterator (without data on ranks other than 0). Returns seconds, bytes and
        counts. Raises `WeightSyncError` naming the tensor when a checksum differs, or the server when one refuses;
        `ServerLost` when one died while others live: calling `update` again with fresh tensors leaves it out.
        """
        ...


class Trainer(Protocol):
    """The policy under training. Every method is a collective: all ranks call it with the same arguments.

    Metrics come back reduced over ranks, equal on all of them.
    """

    def old_logprobs(self, samples: Sequence[Sample]) -> list[TrainSample]:
        """For each sample, in order: log-probs [T] in nats and entropies [T] of the sampled tokens under the current weights
        (logits divided by `rollout.temperature`), and reference log-probs [T] when `algo.kl_coef` is above 0."""
        ...

    def score(self, sample: Sample, *, temperature: float) -> np.ndarray:
        """[T] log-probs in nats of one sample's tokens under the current weights, with logits divided by `temperature`."""
        ...

    def forward_backward(self, batch: Sequence[TrainSample]) -> Mapping[str, float]:
        """Replaces the gradient by that of one mini-batch's loss, whose token weights come from the whole mini-batch. Returns
        its metrics; names that end in `_max` are maxima over tokens."""
        ...

    def optim_step(self) -> Mapping[str, float]:
        """Clips the gradient and steps optimizer and schedule once. Returns `grad_norm` (before clipping) and `lr`. Raises
        `GuardError` when the norm was not a finite number several times in a row; a single such update is skipped."""
        ...

    def weights(self) -> Iterator[NamedTensor]:
        """HF-named, unpadded, unsharded tensors in a fixed order, one at a time: on rank 0 with their data, elsewhere without,
        on the meta device. Every rank must run its iterator to the end: the gathers in between are collective."""
        ...

    def hold(self, parts: frozenset[str]) -> None:
        """Exactly these of `weights`, `gradients` and `optimizer` are on the device when it returns, on every rank; the others are
        in host memory, but gradients nowhere. A verb finds there what it needs: `score`, `weights` and `export_hf` the weights,
        `save` the optimizer too, `load`, `forward_backward` and `optim_step` all."""
        ...

    def save(self, path: Path, *, extra: Mapping[str, Any]) -> None:
        """Writes a checkpoint folder, complete or not there; with `checkpoint.async_save` it appears later. `extra` is
        JSON-able and comes back from `load`. Raises `CheckpointError` when the disk refuses."""
        ...

    def finish_saves(self) -> None:
        """Waits for checkpoints that are still being written. Raises `CheckpointError` for one that failed."""
        ...

    def load(self, path: Path) -> Mapping[str, Any]:
        """Weights, optimizer, schedule and RNG of a checkpoint of any parallel layout; returns its `extra`. Raises
        `CheckpointError` when it is damaged or belongs to another model, before anything is changed."""
        ...

    def export_hf(self, path: Path) -> None:
        """Writes the weights as an HF folder with config and tokenizer. Raises `CheckpointError` when the disk refuses."""
        ...


class Turns(Protocol):
    """Whose memory is on the GPUs that ranks and servers share. Every verb is a collective, and nothing where it is that turn
    already. Raises `ServerError` when a server does not give its memory up."""

    def train(self) -> None:
        """The trainer has all its memory, servers none."""
        ...

    def sync(self) -> None:
        """Trainer and servers have their weights and no more; those of the servers are to be filled."""
        ...

    def sample(self) -> None:
        """Servers have all their memory; the trainer keeps its weights at most."""
        ...

    def save(self) -> None:
        """The trainer has weights and optimizer state; servers keep what weights they have."""
        ...


class RunLog(Protocol):
    """metrics.jsonl, TensorBoard and the console; every rank calls it, rank 0 writes."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of training step `step` (from 0)."""
        ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of an evaluation after `step` steps; empty ones are not written."""
        ...

    def first_sync(self, step: int, report: Mapping[str, float]) -> None:
        """What the sync before a process's first step reported; the other syncs are in the steps' metrics."""
        ...
