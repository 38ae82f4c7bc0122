"""Weight syncs while trajectories are being sampled: sinks that first drain or pause the servers, then sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from torl_mega.errors import WeightSyncError
from torl_mega.interfaces import NamedTensor, WeightSink
from torl_mega.serving.sync.control import Call, Deadline

PAUSE_LIMIT_S = 60.0


class DrainedSink:
    """Calls `drain`, which waits until nothing is being sampled, then syncs: a trajectory keeps one policy version."""

    def __init__(self, sink: WeightSink, drain: Callable[[], None]) -> None:
        self._sink, self._drain = sink, drain

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        self._drain()
        return self._sink.update(tensors, version=version)


class PausedSink:
    """Pauses the servers during the sync; running requests go on under the new weights. `retract` sends them back to the
    queue and computes their KV cache anew; `in_place` keeps the cache of the old weights, which must not be flushed."""

    def __init__(self, sink: WeightSink, urls: Sequence[str], mode: Literal["in_place", "retract"]) -> None:
        self._sink, self._urls, self._mode = sink, tuple(urls), mode

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        self._tell("/pause_generation", {"mode": self._mode})
        try:
            return self._sink.update(tensors, version=version)
        finally:
            self._tell("/continue_generation", {})

    def _tell(self, path: str, body: Mapping[str, str]) -> None:
        """Calls every server. One that does not answer is down: the sink leaves it out and counts it."""
        deadline = Deadline(PAUSE_LIMIT_S)
        for call in [Call(url, path, dict(body), deadline) for url in self._urls]:
            try:
                call.result()
            except WeightSyncError:
                continue
