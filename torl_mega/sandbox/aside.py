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
_AGAIN = 0.45  # above it held snippets go on
_FLOOR = 0.35  # below it snippets are held
_CAREFUL = 0.2  # below it they begin one at a time: most need little, and one that wants more is held soon
_NONE = 0.07  # below it none begins
_CGROUP = Path("/sys/fs/cgroup")


class Aside:
    """The pool's book of snippets that ran for long: waiting for a place aside, aside, held."""

    def __init__(self, limit: int, keep: int) -> None:
        """At most `limit` aside; `keep` of them always run, so that memory is given back in the end."""
        self._limit, self._keep = limit, keep
        self._long: dict[int, ZygoteHandle] = {}  # in slots still, oldest first
        self._aside: dict[int, ZygoteHandle] = {}
        self._held: set[int] = set()
        self._first_mb = available_mb()
        self._short = False

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
            if self._short and len(self._aside) - len(self._held) > self._keep:
                self._hold(snippet)
            count += 1
        return count

    def leave(self, snippet: int) -> bool:
        """The snippet has ended; whether it was aside."""
        self._long.pop(snippet, None)
        self._held.discard(snippet)
        return self._aside.pop(snippet, None) is not None

    def balance(self, free_mb: float, slots: int) -> int:
        """Holds the newest half of those that run when memory is short, lets the oldest go on when it is not. Returns how many
        of the pool's slots may be taken."""
        share = free_mb / self._first_mb if self._aside else 1.0
        self._short = share < _FLOOR
        running = [snippet for snippet in self._aside if snippet not in self._held]
        if self._short:
            for snippet in running[max(self._keep, len(running) // 2) :]:
                self._hold(snippet)
        if self._held and (share > _AGAIN or len(running) < self._keep):
            oldest = next(snippet for snippet in self._aside if snippet in self._held)
            self._held.remove(oldest)
            self._aside[oldest].order(oldest, "go")
        return 0 if share < _NONE else 1 if share < _CAREFUL else slots

    def _hold(self, snippet: int) -> None:
        self._held.add(snippet)
        self._aside[snippet].order(snippet, "hold")


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
