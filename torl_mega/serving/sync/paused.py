"""A weight sync into servers that are sampling: pause them, sync, let them go on under the new weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from torl_mega.errors import WeightSyncError
from torl_mega.interfaces import NamedTensor, WeightSink
from torl_mega.serving.sync.control import Call, Deadline

PAUSE_LIMIT_S = 60.0


class DrainedSink:
    """Waits until nothing is being sampled, then syncs: every trajectory keeps one policy version."""

    def __init__(self, sink: WeightSink, drain: Callable[[], None]) -> None:
        self._sink, self._drain = sink, drain

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        self._drain()
        return self._sink.update(tensors, version=version)


class PausedSink:
    """`retract` sends running requests back to the queue and computes their KV cache anew under the new weights; `in_place`
    lets them go on with the cache of the old ones, which must then not be flushed."""

    def __init__(self, sink: WeightSink, urls: Sequence[str], mode: Literal["in_place", "retract"]) -> None:
        self._sink, self._urls, self._mode = sink, tuple(urls), mode

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        self._tell("/pause_generation", {"mode": self._mode})
        try:
            return self._sink.update(tensors, version=version)
        finally:
            self._tell("/continue_generation", {})

    def _tell(self, path: str, body: Mapping[str, str]) -> None:
        """A server that does not answer is down; the sink leaves it out and counts it."""
        deadline = Deadline(PAUSE_LIMIT_S)
        for call in [Call(url, path, dict(body), deadline) for url in self._urls]:
            try:
                call.result()
            except WeightSyncError:
                continue
