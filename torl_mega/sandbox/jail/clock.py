"""A snippet's own time: since foreign code started, without what others took from it.

Not its own is the time in which it waited for a core that others had, by the kernel's scheduler statistics, and the time in
which the pool held it (SIGSTOP). The priority of a snippet that is set aside sinks with the CPU time it has used.
"""

from __future__ import annotations

import contextlib
import math
import os

PATIENCE = 4  # one that has used much of the cores ends after so many wall limits, however little it gets by then
_LOOK_S = 0.05
MUCH_S = 0.2  # of CPU time: more than almost every program needs that ends by itself
NICE = ((0.1, 14), (MUCH_S, 19))  # below so many CPU seconds; then SCHED_IDLE: when nobody else would


class Clock:
    """Of the child `pid` of this process, whose foreign code began at `started`; `procfs` is a descriptor of /proc, of this
    pid namespace or one around it. Times are monotonic seconds."""

    def __init__(self, pid: int, procfs: int, started: float, limit_s: float) -> None:
        self._pid, self._started, self._limit_s = pid, started, limit_s
        self._held_at: float | None = None
        self._held_s = 0.0
        self._much_at: float | None = None
        self._next_look_s, self._niceness = _LOOK_S, -1  # not set aside
        self._file = -1
        with contextlib.suppress(OSError):  # it has ended, or this /proc hides it
            self._file = os.open(f"{_outer_pid(pid, procfs)}/schedstat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)

    def own_s(self, now: float) -> float:
        return now - self._started - self._held(now) - self._waited_s()

    def left_s(self, now: float, cpu_s: float) -> float:
        """Seconds that it may still run."""
        if cpu_s > MUCH_S and self._much_at is None:
            self._much_at = now - self._held(now)
        left_s = self._limit_s - self.own_s(now)
        if self._much_at is None:
            return left_s
        return min(left_s, self._much_at + PATIENCE * self._limit_s - (now - self._held(now)))

    def hold(self, now: float) -> bool:
        """Its time stands still. Whether it did not before."""
        if self._held_at is not None:
            return False
        self._held_at = now
        return True

    def go(self, now: float) -> bool:
        """Its time goes on. Whether it stood still before."""
        if self._held_at is None:
            return False
        self._held_s, self._held_at = self._held(now), None
        return True

    def set_aside(self, niceness: int) -> None:
        """From here on programs that have used little go before those that have used much; none goes before `niceness`."""
        self._niceness = niceness
        self.sink(0.0)

    def sink(self, cpu_s: float) -> float:
        """Sets the priority of a snippet that has used `cpu_s`, when it is aside. Returns seconds until the next look."""
        if self._niceness < 0:
            return self._next_look_s
        limit_s, nice = next(((s, n) for s, n in NICE if cpu_s < s), (math.inf, 0))
        try:
            if nice:
                os.setpriority(os.PRIO_PROCESS, self._pid, max(nice, self._niceness))
                return max(limit_s - cpu_s, 0.02)
            os.sched_setscheduler(self._pid, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # it goes on at its own priority, or has ended
            pass
        self._next_look_s, self._niceness = math.inf, -1
        return math.inf

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _held(self, now: float) -> float:
        return self._held_s + (now - self._held_at if self._held_at is not None else 0.0)

    def _waited_s(self) -> float:
        """Of its main thread, on the run queue without a core. 0 where the kernel does not count (CONFIG_SCHED_INFO)."""
        try:
            return int(os.pread(self._file, 100, 0).split()[1]) / 1e9  # Documentation/scheduler/sched-stats.rst
        except (OSError, IndexError):
            return 0.0


def _outer_pid(pid: int, procfs: int) -> int:
    """The number by which `procfs` knows our child: it shows that of a pidfd (proc_pid_fdinfo(5))."""
    pidfd = os.pidfd_open(pid)
    try:
        info = os.open(f"self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)
        with open(info) as file:
            return int(file.read().split("Pid:")[1].split()[0])
    finally:
        os.close(pidfd)
