"""Every hostile program, on every tier, as root and as an ordinary user: nothing escapes, nothing breaks, nothing stays."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import Hostile, cases
from pools import ORDINARY_UID, PROJECT, SECRET, Pool, descendants, pool, wait_gone

from torl_mega.rollout.python_session import PythonSessionTool
from torl_mega.rollout.python_tool import Limits
from torl_mega.sandbox.client import SandboxClient
from torl_mega.sandbox.jail.clock import NICE, PATIENCE
from torl_mega.types import ExecutionRequest, ExecutionStatus, Problem

AS_USER = pytest.mark.skipif(os.getuid() != 0, reason="needs root to change user")
CONFIGURATIONS = [  # tier, user, every how many of the programs
    pytest.param("A", None, 1, id="A-self"),
    pytest.param("B", ORDINARY_UID, 3, id="B-user-third", marks=AS_USER),
    pytest.param("B", ORDINARY_UID, 1, id="B-user", marks=(AS_USER, pytest.mark.slow)),
    pytest.param("B", None, 1, id="B-self", marks=pytest.mark.slow),
    pytest.param("A", ORDINARY_UID, 1, id="A-user", marks=(AS_USER, pytest.mark.slow)),
]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool has the run's secret in its environment, and we show it."""
    monkeypatch.setenv("TORL_SECRET", SECRET)


LOOK = """
import decimal, gc, locale, math, os, resource, signal, sys, threading, time
import numpy as np, sympy
here = os.getcwd()
x = sympy.symbols("x")
limits = [resource.getrlimit(n) for n in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)]
handlers = [str(signal.getsignal(n)) for n in (1, 2, 13, 14, 15)]
print(6 * 7, sympy.solve(x - 1), sympy.S.Zero + 1, sympy.Integer(3) == 4, np.arange(3).sum(), np.array([1.23456]), np.geterr())
print(os.listdir("."), os.umask(0), os.nice(0) in OURS, signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getitimer(0))
print(handlers, limits)
print(sorted((k, v.replace(here, "HERE")) for k, v in os.environ.items()), sys.argv, [p.replace(here, "HERE") for p in sys.path])
print(sys.gettrace(), sys.getprofile(), len(sys.meta_path), len(sys.path_hooks), sys.getrecursionlimit(), sys.getswitchinterval())
print(decimal.getcontext().prec, locale.setlocale(locale.LC_ALL), len("abc"), "abc".upper(), sorted(vars(str))[-1], math.sqrt(4))
print(threading.active_count(), gc.isenabled(), gc.callbacks, time.time() > 1e9, len(dir(__builtins__)), sorted(globals())[:8])
""".replace("OURS", repr({0, *(nice for _, nice in NICE)}))  # set aside when the machine is busy
LATE = re.compile(": (took|ended as timeout_wall) ")
OTHER = "x = 'other-snippet-51c9'\nleft_by_other = 1\nimport time\ntime.sleep(0.2)\n"


class Canaries:
    """A file, a folder, a process and listening sockets of the pool's user, and how they looked at first."""

    def __init__(self, served: Pool, user: int | None) -> None:
        self.file = served.folder / "canary"
        self.file.write_text("intact")
        self.dir = served.folder / "dir"
        self.dir.mkdir()
        if user is not None:
            os.chown(self.file, user, user)
            os.chown(self.dir, user, user)
        as_user = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        self.process = subprocess.Popen(["sleep", "1000"], **as_user)  # type: ignore[call-overload]
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.name = f"torlcan{os.getpid() % 1000:03d}"
        self.unix.bind(f"\0{self.name}")
        self.unix.setblocking(False)
        self.served = served
        self.first = self.look()
        self.fresh = ""  # what LOOK says before any hostile program has run

    def look(self) -> tuple[object, ...]:
        info = self.file.stat()
        pid = self.process.pid
        try:
            heard = self.unix.recv(100)
        except BlockingIOError:
            heard = b""
        return (
            self.file.read_text(), info.st_mode, info.st_uid, info.st_mtime_ns, info.st_nlink,
            os.listdir(self.dir), os.listxattr(self.file),
            self.process.poll(), os.getpriority(os.PRIO_PROCESS, pid), os.sched_getaffinity(pid), heard, self.served.process.poll(),
        )  # fmt: skip

    def fill(self, code: str) -> str:
        values = {
            "@FILE@": self.file, "@DIR@": self.dir, "@PID@": self.process.pid, "@POOL@": self.served.process.pid,
            "@PORT@": self.tcp.getsockname()[1], "@SOCK@": self.served.socket, "@ABSTRACT@": self.name, "@PROJECT@": PROJECT,
        }  # fmt: skip
        for key, value in values.items():
            code = code.replace(key, str(value))
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.tcp.close()
        self.unix.close()


async def attack(client: SandboxClient, case: Hostile, canaries: Canaries, *, in_session: bool = False) -> list[str]:
    """What was wrong; empty when all held."""
    wrong = []
    request = ExecutionRequest(canaries.fill(case.code), stdin=case.stdin, wall_s=case.limit_s, cpu_s=case.limit_s)
    if in_session:
        limits = Limits(case.limit_s, case.limit_s, request.memory_mb, request.output_bytes)
        session = PythonSessionTool(client, limits, 60.0).open(Problem("p", "", "", ""))
        request = dataclasses.replace(session.request(request.code), stdin=case.stdin)
    result = await client.run(request)
    allowed = (
        set(ExecutionStatus) - {ExecutionStatus.INFRA} if in_session else case.allowed
    )  # keeping its names may fail
    if result.status not in allowed:
        wrong.append(f"ended as {result.status.value} rc={result.return_code} {result.stderr[-200:]} {result.message}")
    if any(line.startswith("ESCAPED") for line in result.stdout.splitlines()):
        wrong.append(f"escaped: {result.stdout[:200]}")
    if case.stdout is not None and result.stdout != case.stdout and not in_session:
        wrong.append(f"said {result.stdout[:100]!r} {result.stderr[-200:]}")
    if result.wall_s > PATIENCE * case.limit_s + 1.0:  # by the limit where it does not wait for others' cores
        wrong.append(f"took {result.wall_s:.1f} s")
    after = await client.run(ExecutionRequest(LOOK))
    if after.stdout != canaries.fresh:
        wrong.append(f"the next snippet said {after}, not {canaries.fresh}")
    if (now := canaries.look()) != canaries.first:
        wrong.append(f"a canary changed: {now} from {canaries.first}")
    return [f"{case.name}: {w}" for w in wrong]


async def _attack_all(
    served: Pool, canaries: Canaries, chosen: list[Hostile], *, in_session: bool = False
) -> list[str]:
    wrong: list[str] = []
    queue = list(chosen)
    async with SandboxClient([served.address]) as client:
        canaries.fresh = (await client.run(ExecutionRequest(LOOK))).stdout
        assert canaries.fresh.startswith("42 [1] 1 False 3 [1.23456]")

        async def worker() -> None:
            while queue:
                wrong.extend(await attack(client, queue.pop(0), canaries, in_session=in_session))

        async def neighbour() -> None:
            while queue:
                assert (await client.run(ExecutionRequest(OTHER))).status is ExecutionStatus.OK

        await asyncio.gather(*(worker() for _ in range(8)), neighbour())
        late = {w.split(":")[0] for w in wrong if LATE.search(w)}  # among others on a busy machine: once more, alone
        wrong = [w for w in wrong if not LATE.search(w)]
        for case in [c for c in chosen if c.name in late]:
            wrong.extend(await attack(client, case, canaries, in_session=in_session))
    return wrong


async def _run_one(served: Pool) -> None:
    async with SandboxClient([served.address]) as client:
        await client.run(ExecutionRequest(LOOK))


# where the checkout itself lies below /tmp, the private /tmp shows the way to the interpreter, one folder more
SEES_OWN_TMP = {"project_list", "odd_names"} if Path(sys.prefix).is_relative_to("/tmp") else set()


@pytest.mark.parametrize(("tier", "user", "every"), CONFIGURATIONS)
def test_hostile_corpus(tier: str, user: int | None, every: int) -> None:
    with pool(tier=tier, user=user, max_running=10, data_libraries=False) as served:
        canaries = Canaries(served, user)
        before = descendants(served.process.pid)
        try:
            chosen = [c for c in cases() if c.name not in SEES_OWN_TMP][::every]
            wrong = asyncio.run(_attack_all(served, canaries, chosen))
            left = descendants(served.process.pid, slot_inits=False) - before
            asyncio.run(_run_one(served))  # in the child that was forked ahead
            stray = wait_gone(left, 2.0)
        finally:
            canaries.close()
        assert not wrong, "\n".join(wrong)
        assert stray == set(), "a snippet's process stayed, or a zygote had to be replaced"
        boxes = [
            p for base in Path("/tmp").glob(f"torl-sandbox-{served.process.pid}-*/zygote-*") for p in base.glob("box-*")
        ]
        deadline = time.monotonic() + 5
        while [p for p in boxes if p.exists()] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [p for p in boxes if p.exists()] == []


@pytest.mark.parametrize("every", [pytest.param(9, id="a ninth"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_hostile_corpus_in_sessions(every: int) -> None:
    """The same programs as the first call of a `python_session`."""
    with pool(tier="auto", max_running=10, data_libraries=False) as served:
        canaries = Canaries(served, None)
        chosen = [c for c in cases() if c.name not in SEES_OWN_TMP][::every]
        try:
            wrong = asyncio.run(_attack_all(served, canaries, chosen, in_session=True))
        finally:
            canaries.close()
        assert not wrong, "\n".join(wrong)


def test_corpus_is_large() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) >= 120
