"""The seams of the system. The loop and the rollout see these Protocols and never an engine.

Implementations are passed in as objects by `train.py`; nothing here has state or a default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torl_mega.types import (
    ExecutionRequest,
    ExecutionResult,
    Generation,
    GenerationRequest,
    Reward,
    Sample,
    StepBatch,
    TrainSample,
    Trajectory,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


T = TypeVar("T")


class Generator(Protocol):
    """Samples tokens. Raises `GenerationError` when every retry failed."""

    async def generate(self, request: GenerationRequest) -> Generation: ...


class Sandbox(Protocol):
    """Runs untrusted programs. Never raises for what a program does; INFRA is what it could not help."""

    async def run(self, request: ExecutionRequest) -> ExecutionResult: ...


class RewardFn(Protocol):
    """Scores a finished trajectory. A hanging answer costs its own time limit and nothing else."""

    async def score(self, trajectory: Trajectory) -> Reward: ...


class Rollouts(Protocol):
    """Rank 0's half of a step: everything that talks to servers, sandboxes, graders and files."""

    def collect(self, step: int) -> StepBatch:
        """The samples of one step, sampled, scored and recorded. Raises `Preempted` when told to stop meanwhile."""
        ...

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Metrics of the benchmarks under the current weights; does not touch cursor or seeds of training."""
        ...

    def state(self) -> Mapping[str, Any]:
        """JSON-able: where the next `collect` goes on. Restored by `restore`."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Share(Protocol):
    """Calls `make` on rank 0 and gives its result, or its exception, to every rank."""

    def __call__(self, make: Callable[[], T]) -> T: ...


NamedTensor = tuple[str, "torch.Tensor"]


class WeightSink(Protocol):
    """Puts weights into every server, verifies what each one holds, and records the policy version.

    Every trainer rank calls `update` with its own iterator of HF-named tensors (empty on ranks that send nothing).
    Raises `WeightSyncError` naming the tensor when a checksum differs, or the server when one refuses or dies.
    """

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]: ...


class Trainer(Protocol):
    """The policy under training. Every method is a collective: all ranks call it with the same arguments.

    Metrics come back reduced over ranks, equal on all of them.
    """

    def old_logprobs(self, samples: Sequence[Sample]) -> list[TrainSample]: ...

    def score(self, sample: Sample, *, temperature: float) -> np.ndarray:
        """[T] log-probs of one sample's tokens, with logits divided by `temperature`."""
        ...

    def forward_backward(self, batch: Sequence[TrainSample]) -> Mapping[str, float]: ...

    def optim_step(self) -> Mapping[str, float]: ...

    def weights(self) -> Iterator[NamedTensor]:
        """HF-named, unpadded, unsharded tensors in a fixed order, one at a time; yields on rank 0 only."""
        ...

    def save(self, path: Path, *, extra: Mapping[str, Any]) -> None: ...

    def finish_saves(self) -> None:
        """Waits for checkpoints that are still being written."""
        ...

    def load(self, path: Path) -> Mapping[str, Any]: ...

    def export_hf(self, path: Path) -> None: ...


class RunLog(Protocol):
    """The run's own account of itself; writes on rank 0 only."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def first_sync(self, step: int, report: Mapping[str, float]) -> None: ...
