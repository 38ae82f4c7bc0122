"""Trainer and servers take turns on the same GPUs: one small state machine says who holds the memory.

    TRAINING ──wake_weights──► SYNCING ──wake_cache──► GENERATING ──sleep──► TRAINING
    trainer on the GPU         server weights there    + KV cache            server holds nothing but its context
                               (trainer sends them)    trainer offloaded

The order is the point: weights come back before they are written, the KV cache only when the trainer's buckets are gone,
and nothing is released while requests run (SGLang's scheduler dies of an assertion then). A call out of order raises
WeightSyncError instead of finding out. Memory is given back for real only by servers started with
`--enable-memory-saver` (CUDA); elsewhere the same calls are answered and free nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from torl_mega.errors import WeightSyncError
from torl_mega.serving.sync.control import Deadline, call_all


class Phase(StrEnum):
    TRAINING = "training"
    SYNCING = "syncing"
    GENERATING = "generating"


WEIGHTS, KV_CACHE, GRAPHS = "weights", "kv_cache", "cuda_graph"


class SharedGpus:
    """The servers' half of the turns. `offload` and `restore` move the trainer's optimizer state and gradients out of
    GPU memory and back; they run at the moment at which the other side has none of it."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        offload: Callable[[], None],
        restore: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self.phase = Phase.GENERATING  # a server that has just started holds everything
        self._urls = tuple(urls)
        self._offload, self._restore = offload, restore
        self._timeout_s = timeout_s

    def sleep(self) -> None:
        """No more requests: the servers give their memory back, then the trainer takes it."""
        self._leave(Phase.GENERATING, "sleep")
        self._call("/pause_generation", {"mode": "abort"})  # frees a release from requests that are still running
        self._call("/release_memory_occupation", {"tags": [KV_CACHE, WEIGHTS, GRAPHS]})
        self._restore()
        self.phase = Phase.TRAINING

    def wake_weights(self) -> None:
        """The update is done: the trainer keeps only its weights on the GPU, the servers get room for theirs."""
        self._leave(Phase.TRAINING, "wake_weights")
        self._offload()
        self._call("/resume_memory_occupation", {"tags": [WEIGHTS]})
        self.phase = Phase.SYNCING

    def wake_cache(self) -> None:
        """The weights were sent and verified: the rest comes back and requests may come."""
        self._leave(Phase.SYNCING, "wake_cache")
        self._call("/resume_memory_occupation", {"tags": [KV_CACHE, GRAPHS]})
        self._call("/continue_generation", {})
        self.phase = Phase.GENERATING

    def _leave(self, needed: Phase, verb: str) -> None:
        if self.phase is not needed:
            raise WeightSyncError(f"{verb} in phase {self.phase}, it belongs to {needed}; the turns are out of order")

    def _call(self, path: str, body: dict[str, object]) -> None:
        call_all(self._urls, path, body, Deadline(self._timeout_s))
