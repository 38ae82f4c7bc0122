"""Pool processes for tests: started as root or as an ordinary user, in a given tier, and checked for leftovers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from torl_mega.sandbox.jail.pid_namespaces import INIT

PROJECT = Path(__file__).resolve().parents[2]
ORDINARY_UID = 61999  # no account
SECRET = "canary-secret-7f3a"  # what no snippet may see


@dataclass
class Pool:
    process: subprocess.Popen[str]
    socket: str
    url: str
    folder: Path  # belongs to the pool's user
    ready: str

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"


def _can_run(user: int) -> bool:
    """Whether `user` may execute our interpreter."""
    try:
        return (
            subprocess.run([sys.executable, "-c", ""], user=user, group=user, extra_groups=[], check=False).returncode
            == 0
        )
    except PermissionError:
        return False


@contextlib.contextmanager
def pool(*, tier: str = "auto", user: int | None = None, check: bool = True, **settings: object) -> Iterator[Pool]:
    """A served pool with both doors open. `user`: run as this uid (the tests must be root). Checks that nothing stays."""
    if user is not None and not _can_run(user):
        pytest.skip(
            f"{os.path.realpath(sys.executable)} lies where an ordinary user may not go: use the system's Python"
        )
    with tempfile.TemporaryDirectory(prefix="torl-test-") as folder:
        if user is not None:
            os.chown(folder, user, user)
        process = start(Path(folder), tier=tier, user=user, **settings)
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("sandbox ready"), (ready, process.stderr.read() if process.stderr else "")
        socket, url = ready.split("address=")[1].strip().split(",")
        made = Pool(process, socket.removeprefix("unix:"), url, Path(folder), ready)
        tree = descendants(process.pid)
        try:
            yield made
            tree |= descendants(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()
            process.stdout.close()
        if check:
            assert wait_gone(tree, 5.0) == set(), "processes outlived the pool"
            assert scratch_of(process.pid) == [], "scratch folders outlived the pool"


def start(
    folder: Path,
    *,
    tier: str,
    user: int | None,
    **settings: object,
) -> subprocess.Popen[str]:
    values = {"tier": tier, **settings}
    command = [sys.executable, "-m", "torl_mega.sandbox.serve", "--socket", str(folder / "s"), "--port", "0"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    env |= {name: os.environ[name] for name in ("TORL_SECRET",) if name in os.environ}  # then callers must show it
    as_user = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    return subprocess.Popen(
        [*command, "--settings", json.dumps(values)],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd="/",
        umask=0o077,  # a careful host's
        **as_user,
    )  # type: ignore[call-overload]


def descendants(pid: int, *, slot_inits: bool = True) -> set[int]:
    """Of the process tree below `pid`; slots get their inits when they are first used."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path("/proc", entry, "stat").read_text()
                if slot_inits or f"({INIT.decode()})" not in stat:
                    children.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    out: set[int] = set()
    queue = [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            out.add(child)
            queue.append(child)
    return out


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pids: set[int], timeout_s: float) -> set[int]:
    """The pids that still live after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := {p for p in pids if alive(p)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def scratch_of(pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"torl-sandbox-{pid}-*"))
