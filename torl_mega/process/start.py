"""Child processes that die with their parent, by SIGKILL too; and `free_port`, `tail`.

Every child runs below a reaper (`reaper.py`): its own session and process group, and when this process ends, by
whatever means (SIGKILL included), or calls `stop`, the child's whole tree is gone within a few seconds, detached
descendants too. A reaper costs about 30 ms to start and 7 MB. Linux only; no torch, no asyncio here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_REAPER = Path(__file__).with_name("reaper.py")
PORTS, PORT_TRIES = (15000, 32000), 100  # Linux gives outgoing connections 32768..60999 by default
START_LIMIT_S = 30.0  # from fork to exec of the command; seconds only on a machine that swaps
_PR_SET_PDEATHSIG = 1
REAP_LIMIT_S = 15.0  # what the reaper may take past the grace time before it is killed itself


class GuardedProcess:
    """One running child. Thread-safe as far as subprocess.Popen is; not to be shared over fork."""

    def __init__(self, name: str, reaper: subprocess.Popen[bytes], channel: socket.socket, pid: int) -> None:
        self.name = name
        self.pid = pid  # of the command itself
        self._reaper = reaper
        self._channel = channel

    @property
    def stdin(self) -> IO[bytes] | None:
        return self._reaper.stdin

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the command runs."""
        return self._reaper.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Blocks until the command and its tree are gone. Raises subprocess.TimeoutExpired."""
        return self._reaper.wait(timeout)

    def stop(self, grace_s: float = 5.0) -> int:
        """SIGTERM to the command's group, SIGKILL to the whole tree after `grace_s`; returns when all is gone."""
        self.begin_stop(grace_s)
        if self._reaper.poll() is None:
            try:
                self._reaper.wait(grace_s + REAP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._reaper.kill()  # PDEATHSIG takes the command along
        self._channel.close()
        return self._reaper.wait()

    def begin_stop(self, grace_s: float) -> None:
        """Begins what `stop` does and returns at once; a second time with a shorter grace brings the end nearer."""
        if self._reaper.poll() is None:
            with contextlib.suppress(OSError):  # the reaper ended between the two lines
                self._channel.sendall(f"stop {grace_s}\n".encode())

    def __enter__(self) -> GuardedProcess:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()


def start(
    cmd: Sequence[str | os.PathLike[str]],
    *,
    name: str,
    log_path: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    scratch: Path | None = None,
) -> GuardedProcess:
    """Starts `cmd` under a reaper.

    `log_path` takes stdout and stderr (appended; parents are made); None inherits ours. `env` replaces the environment.
    `scratch` is made as the child's TMPDIR; the reaper removes it, and its parent if that is empty then, with the tree.
    Raises FileNotFoundError when the command cannot be executed.
    """
    if scratch is not None:
        scratch.mkdir(mode=0o711)  # a sandbox in it runs snippets as other users
        env = {**(os.environ if env is None else env), "TMPDIR": str(scratch)}
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-I", "-S", str(_REAPER), str(theirs.fileno()), str(scratch or "")]
    words += [os.fspath(part) for part in cmd]
    with contextlib.ExitStack() as stack:
        stack.callback(theirs.close)
        log: IO[bytes] | None = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(log_path.open("ab"))
        reaper = subprocess.Popen(
            words,
            stdin=stdin,
            stdout=log,
            stderr=subprocess.STDOUT if log is not None else None,
            env=None if env is None else dict(env),
            cwd=cwd,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    ours.settimeout(START_LIMIT_S)
    try:
        kind, _, text = ours.makefile("rb").readline().decode().strip().partition(" ")
    except TimeoutError:
        reaper.kill()
        raise
    if kind != "pid":
        reaper.wait()
        ours.close()
        raise FileNotFoundError(f"{name}: {text or 'the reaper died before the command ran'}")
    ours.settimeout(None)
    return GuardedProcess(name, reaper, ours, int(text))


def die_with_parent(parent: int) -> None:
    """SIGKILL for the calling process when the thread of `parent` that started it ends, or at once if it has ended
    already. Not inherited by its own forks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def forks_die_with_parent() -> None:
    """`die_with_parent` in every fork that this process and its forks make from now on (not in what they execute)."""
    forking = []
    os.register_at_fork(
        before=lambda: forking.append(os.getpid()),
        after_in_parent=forking.pop,
        after_in_child=lambda: die_with_parent(forking.pop()),
    )


def tail(log_path: Path, num_lines: int = 30, *, begin: int = 0, max_bytes: int = 65536) -> str:
    """The last lines of a log, of what follows byte `begin`; "" when there is none."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(begin, os.fstat(log.fileno()).st_size - max_bytes))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-num_lines:])
    except FileNotFoundError:
        return ""


def short_tempdir(longest: int) -> str:
    """Where temporary folders go: the system's place for them, or /tmp where that has more than `longest` bytes, because a
    unix socket's path may have 107."""
    base = tempfile.gettempdir()
    return base if len(os.fsencode(base)) <= longest else "/tmp"


def free_port(host: str = "127.0.0.1") -> int:
    """An even port nobody listens on now, nor on the next one, which an SGLang server takes too; below the range that the
    kernel hands to outgoing connections: one from there could be taken while a server still loads its weights. Another
    program can take it too: whoever binds it must say so."""
    for _ in range(PORT_TRIES):
        port = random.SystemRandom().randrange(*PORTS, 2)
        if not (port_in_use(host, port) or port_in_use(host, port + 1)):
            return port
    raise OSError(f"no free port in {PORTS[0]}..{PORTS[1] - 1} on {host} after {PORT_TRIES} tries")


def port_in_use(host: str, port: int) -> bool:
    """True when binding `host:port` fails now; host "" is every address of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
