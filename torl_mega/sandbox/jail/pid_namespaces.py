"""A pid namespace per slot (tier A), each kept alive by an init that only sleeps.

They are made when a slot is first used, by a process that was forked before the libraries were imported: an init costs little
memory, and a pool with many slots starts at once. That process ends when an init dies, which the zygote takes for its own end.
"""

from __future__ import annotations

import errno
import os
import signal
import socket

from torl_mega.sandbox.jail import linux

INIT = b"torl-slot-init"  # as ps shows it


class PidNamespaces:
    """By slot, for setns(2). `procfs` is a descriptor of /proc of the caller's pid namespace."""

    def __init__(self, procfs: int) -> None:
        self._of: dict[int, int] = {}
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if os.fork() == 0:
                try:
                    _make_as_asked(theirs, procfs)
                finally:
                    os._exit(1)

    def of(self, slot: int) -> int:
        """Raises OSError when none can be made."""
        if slot not in self._of:
            self._channel.send(b".")
            said, fds, _, _ = socket.recv_fds(self._channel, 1, 1)
            if not fds:
                raise OSError(int.from_bytes(said) or errno.EIO, "no pid namespace for a slot")
            os.set_inheritable(fds[0], False)
            self._of[slot] = fds[0]
        return self._of[slot]


def _make_as_asked(channel: socket.socket, procfs: int) -> None:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, lambda *_: os._exit(1))
    own = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)
    kept = sorted((0, 1, 2, channel.fileno(), procfs, own))
    for low, high in zip(kept, [*kept[1:], 1 << 20], strict=True):
        if high > low + 1:
            linux.close_range(low + 1, high - 1)
    while channel.recv(1):
        try:
            made = _make(own, procfs)
        except OSError as exc:
            channel.send(bytes([exc.errno or errno.EIO]))
        else:
            socket.send_fds(channel, [b"\0"], [made])
            os.close(made)


def _make(own: int, procfs: int) -> int:
    linux.setns(own, linux.CLONE_NEWPID)
    linux.unshare(linux.CLONE_NEWPID)
    if os.fork() == 0:
        _sleep_as_init()
    return os.open("self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC, dir_fd=procfs)


def _sleep_as_init() -> None:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.set_name(INIT)
    os.setsid()
    linux.close_range(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    while True:
        signal.pause()
