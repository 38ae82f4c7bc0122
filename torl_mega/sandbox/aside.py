"""Snippets that take longer: they leave their slot to those that wait, and go on beside them while memory lasts.

    slot (at most max_running) ──50 ms──► aside: lowest priority (at most max_aside) ◄──hold, go──► held: stopped

A slot is for work: programs that sleep, hang or compute for long must not keep ordinary ones, which take 14 ms, waiting. Their
own limits hold on; time that they wait for a core or are held is not charged (jail/zygote.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torl_mega.sandbox.host import ZygoteHandle

TICK_S = 0.05  # a program fills some 100 MB in it
# shares of the memory that was available at first
_SHORT = 0.35  # below it, and while it shrinks, fewer may run
_STEADY = 0.005
_CAREFUL = 0.2  # below it they begin one at a time: most need little, and one that wants more is held soon
_NONE = 0.07  # below it none begins
_CGROUP = Path("/sys/fs/cgroup")


class Aside:
    """The pool's book of snippets that ran for long: waiting for a place aside, aside, held."""

    def __init__(self, limit: int, keep: int) -> None:
        """At most `limit` aside; the `keep` oldest of them always run, so that memory is given back in the end."""
        self._limit, self._keep = limit, keep
        self._long: dict[int, ZygoteHandle] = {}  # in slots still, oldest first
        self._aside: dict[int, ZygoteHandle] = {}  # oldest first
        self._held: set[int] = set()
        self._may_run = limit  # so many of the oldest; the others are held
        self._first_mb = available_mb()
        self._share = 1.0

    def __len__(self) -> int:
        return len(self._aside)

    def note_long(self, snippet: int, zygote: ZygoteHandle) -> None:
        self._long[snippet] = zygote

    def take(self) -> int:
        """Sets aside what may be; the number of slots that this makes free."""
        count = 0
        while self._long and len(self._aside) < self._limit:
            snippet = next(iter(self._long))
            self._aside[snippet] = zygote = self._long.pop(snippet)
            zygote.order(snippet, "aside")
            count += 1
        self._hold_and_go()
        return count

    def leave(self, snippet: int) -> bool:
        """The snippet has ended; whether it was aside."""
        self._long.pop(snippet, None)
        self._held.discard(snippet)
        if self._aside.pop(snippet, None) is None:
            return False
        self._hold_and_go()
        return True

    def balance(self, free_mb: float, slots: int) -> int:
        """Half as many may run as do when memory is short and shrinks, one more when it does not shrink. Returns how many of
        the pool's slots may be taken."""
        before, self._share = self._share, free_mb / self._first_mb if self._aside else 1.0
        running = len(self._aside) - len(self._held)
        if self._share < _SHORT and self._share < before - _STEADY:
            self._may_run = max(self._keep, running // 2)
        elif self._share < _CAREFUL:
            self._may_run = self._keep
        else:
            self._may_run = min(self._limit, max(self._may_run, running) + 1)
        self._hold_and_go()
        return 0 if self._share < _NONE else 1 if self._share < _CAREFUL else slots

    def _hold_and_go(self) -> None:
        for rank, (snippet, zygote) in enumerate(self._aside.items()):
            if rank >= self._may_run and snippet not in self._held:
                self._held.add(snippet)
                zygote.order(snippet, "hold")
            elif rank < self._may_run and snippet in self._held:
                self._held.remove(snippet)
                zygote.order(snippet, "go")


def available_mb() -> float:
    """Memory that can be had without swapping, on this machine and in this control group."""
    text = Path("/proc/meminfo").read_text()
    free = int(text.split("MemAvailable:")[1].split()[0]) / 1024
    return min([free, *_group_headroom_mb()])


def _group_headroom_mb() -> Iterator[float]:
    """Of the control group at the root of /sys/fs/cgroup, which in a container is its own: version 2, then 1."""
    for folder, most, used in (
        (_CGROUP, "memory.max", "memory.current"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError, IndexError):  # no such group, or `max`
            cache = int((folder / "memory.stat").read_text().split("inactive_file ")[1].split()[0])
            yield (int((folder / most).read_text()) - int((folder / used).read_text()) + cache) / (1 << 20)
