"""How long a process has waited for a core that others had, from the kernel's scheduler statistics."""

from __future__ import annotations

import contextlib
import os


class WaitClock:
    """The main thread of `pid`, a child of this process; `procfs` is a descriptor of /proc, of this pid namespace or one
    around it."""

    def __init__(self, pid: int, procfs: int) -> None:
        self._file = -1
        with contextlib.suppress(OSError):  # it has ended, or this /proc hides it
            self._file = os.open(f"{_outer_pid(pid, procfs)}/schedstat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)

    def read_s(self) -> float:
        """Seconds on the run queue without a core. 0 where the kernel does not count (CONFIG_SCHED_INFO)."""
        try:
            return int(os.pread(self._file, 100, 0).split()[1]) / 1e9  # Documentation/scheduler/sched-stats.rst
        except (OSError, IndexError):
            return 0.0

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _outer_pid(pid: int, procfs: int) -> int:
    """The number by which `procfs` knows our child: it shows that of a pidfd (proc_pid_fdinfo(5))."""
    pidfd = os.pidfd_open(pid)
    try:
        info = os.open(f"self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)
        with open(info) as file:
            return int(file.read().split("Pid:")[1].split()[0])
    finally:
        os.close(pidfd)
