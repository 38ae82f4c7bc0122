"""The trainer's ranks that take part in a sync, kept in step: rank 0, and those that hand weights to servers beside them.

Contract: every call is a collective of these ranks, from one thread, in the same order. At each boundary (`agree`) each
says whether it is well; when one is not, all raise the first failure, so that nobody waits for a rank that gave up.
Whoever waits does so within the deadline and a little more, in which a failure still gets around.
A crew of rank 0 alone needs no process group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torl_mega.errors import WeightSyncError
from torl_mega.serving.sync.control import POLL_S, Call, Deadline, run_bounded, watch

GRACE_S = 5.0


class Crew:
    """Its groups are made at the first `agree`: gloo for words, and where weights are on GPUs NCCL for them."""

    def __init__(self, ranks: Iterable[int], device: torch.device) -> None:
        self.ranks = sorted({0, *ranks})
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._device = device
        self.broken = False  # a rank is lost, or too late: no step of a crew follows, and no gather either
        self._words: Any = None
        self._weights: Any = None

    def _make_groups(self) -> tuple[Any, Any]:
        """With their connections, which NCCL leaves to the first collective."""
        store, place = c10d._get_default_store(), self.ranks.index(self.rank)
        words = weights = make_group("torl_crew_gloo", "gloo", store, place, self.ranks, timedelta(days=2))
        if self._device.type == "cuda":  # deadlines are shorter than these two days
            weights = make_group("torl_crew_nccl", "nccl", store, place, self.ranks, timedelta(days=2))
        dist.broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device), src=0, group=weights)
        return words, weights

    def agree(self, failure: str, deadline: Deadline, note: Any = None) -> Any:
        """Rank 0's `note`, when no rank reports a failure; else raises WeightSyncError with the first one."""
        said: list[Any] = [(failure, note)]
        if self._words is None and len(self.ranks) > 1:
            self._words, self._weights = self._bounded(self._make_groups, deadline)
        if self._words is not None:
            said = [None] * len(self.ranks)
            self._bounded(lambda: dist.all_gather_object(said, (failure, note), group=self._words), deadline)
        if first := next((text for text, _ in said if text), ""):
            raise WeightSyncError(first)
        return said[0][1]

    def broadcast(self, flat: torch.Tensor, deadline: Deadline) -> None:
        """Rank 0's bytes to all; returns when they are here, on a GPU too."""
        if self._weights is not None:
            work = dist.broadcast(flat, src=0, group=self._weights, async_op=True)
            try:
                wait_for([work], self._what, deadline, ())
            except WeightSyncError:
                self.broken = True
                raise
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()

    def pass_on(self, data: bytes, to: int, deadline: Deadline) -> None:
        """Gives `data` to another rank, which calls `take`."""
        self._bounded(lambda: dist.send_object_list([data], dst=to, group=self._words), deadline)

    def take(self, sender: int, deadline: Deadline) -> bytes:
        box: list[Any] = [None]
        self._bounded(lambda: dist.recv_object_list(box, src=sender, group=self._words), deadline)
        return box[0]

    def _bounded(self, work: Callable[[], Any], deadline: Deadline) -> Any:
        try:
            return run_bounded(work, self._what, deadline.later(GRACE_S), ())
        except WeightSyncError:
            self.broken = True
            raise

    @property
    def _what(self) -> str:
        return f"trainer ranks {', '.join(map(str, self.ranks))} in a weight sync"


def make_group(name: str, backend: str, store: Any, rank: int, ranks: Sequence[int], limit: timedelta) -> Any:
    """A process group of these ranks alone, beside all others. dist.new_group wants either every rank of the world to call it,
    or the same number of groups on each of its ranks, which Megatron's layouts do not have. Source: sglang
    srt/utils/common.py init_custom_process_group, which cannot be imported without loading all of SGLang into the trainer."""
    store = c10d.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        len(ranks), rank, [], c10d.Backend(backend), store, group_name=c10d.GroupName(name), timeout=limit
    )
    c10d._world.pg_group_ranks[group] = {member: place for place, member in enumerate(ranks)}
    return group


def wait_for(works: Sequence[Any], what: str, deadline: Deadline, calls: Sequence[Call]) -> None:
    """Waits for collectives under way. Raises WeightSyncError when one fails, one of `calls` is refused, or in the end."""
    while not all(work.is_completed() for work in works):
        watch(what, deadline, calls)
        time.sleep(POLL_S)
    try:
        for work in works:
            work.wait()
    except RuntimeError as exc:
        for call in calls:  # a server that died says more than the group does
            call.check()
        raise WeightSyncError(f"{what}: {' '.join(str(exc).split())[:300]}") from exc
