"""Runs one command and sees to it that its whole tree ends with it, or with whoever asked for it.

Started by `process.start` as `python -I -S reaper.py FD SCRATCH CMD...`; stands between the asker and the command. FD is
a socket to the asker: this side writes `pid N` or `error TEXT`, the asker writes `stop GRACE_S`. When the socket closes
(the asker died, however), or on SIGTERM, the command's group gets SIGTERM and, after the grace, every descendant gets
SIGKILL. The reaper is a child subreaper, so a descendant that detaches itself (setsid, double fork) is still its own.
SCRATCH, unless empty, is the tree's folder for temporary files: once the tree is gone it is removed with all in it, and
the folder above it too if it is empty. The reaper ends as the command ended, by the same code or signal.

Linux only. Standard library only, and few modules of it: one of these runs for every child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time

ORPHAN_GRACE_S = 1.0  # after the asker died: long enough for a handler to remove its files, short enough to be prompt
KILL_LIMIT_S = 10.0  # a process in uninterruptible sleep ignores even SIGKILL; do not wait for it for ever
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)
_command_pid = -1


def _processes() -> list[tuple[int, bytes, int]]:
    """(pid, state, parent's pid) of every process that can be seen."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                with open(f"/proc/{entry}/stat", "rb") as stat:
                    state, parent = stat.read().rsplit(b")", 1)[1].split()[:2]
                found.append((int(entry), state, int(parent)))
    return found


def descendants(root: int) -> list[int]:
    """Pids below `root`, zombies left out."""
    children: dict[int, list[int]] = {}
    for pid, state, parent in _processes():
        if state not in (b"Z", b"X"):
            children.setdefault(parent, []).append(pid)
    found, frontier = [], [root]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def _reap() -> None:
    """Collects orphans that were handed to us; the command itself is left to Popen."""
    for pid, state, parent in _processes():
        if state == b"Z" and parent == os.getpid() and pid != _command_pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _kill_all() -> None:
    """SIGKILL to every descendant until none is left (a fork can slip past one sweep); gives up after KILL_LIMIT_S."""
    deadline = time.monotonic() + KILL_LIMIT_S
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        _reap()


def _remove(scratch: str) -> None:
    if not scratch:
        return
    import shutil  # ten times the time of all the other imports

    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # other trees still have theirs beside it
        os.rmdir(os.path.dirname(scratch))


def _die_with_reaper() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(command: subprocess.Popen[bytes], asker: socket.socket) -> None:
    """Returns when the command has ended; ends it when told to or when the asker is gone."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    stop = {"asked": False}
    signal.signal(signal.SIGTERM, lambda *_: stop.update(asked=True))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    deadline, buffer, sources = None, b"", [asker.fileno(), wake_read]
    while command.poll() is None:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(sources, [], [], left)
        grace = None
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap()
            if stop["asked"] and deadline is None:
                grace = ORPHAN_GRACE_S
        if asker.fileno() in ready:
            data = asker.recv(256)
            buffer += data
            if not data:
                sources, grace = [wake_read], ORPHAN_GRACE_S
            elif b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                grace = float(line.split()[1])
        if grace is not None:
            deadline = min(deadline or float("inf"), time.monotonic() + grace)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGTERM)
        if deadline is not None and time.monotonic() >= deadline:
            return


def main() -> None:
    global _command_pid
    asker = socket.socket(fileno=int(sys.argv[1]))
    asker.set_inheritable(False)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command = subprocess.Popen(sys.argv[3:], start_new_session=True, preexec_fn=_restore_and_bind)
    except OSError as exc:
        _remove(sys.argv[2])
        asker.sendall(f"error {exc.strerror}: {sys.argv[3]}\n".encode())
        sys.exit(127)
    _command_pid = command.pid
    with contextlib.suppress(OSError):  # the asker may be gone already; _watch sees that
        asker.sendall(f"pid {command.pid}\n".encode())
    _watch(command, asker)
    _kill_all()
    _remove(sys.argv[2])
    code = command.wait()
    if code < 0:
        _libc.prctl(PR_SET_DUMPABLE, 0)  # the core file, if any, was the command's
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _restore_and_bind() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _die_with_reaper()


if __name__ == "__main__":
    main()
