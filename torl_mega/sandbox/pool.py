"""The sandbox pool: admits, runs and answers. One per node, in a process of its own (serve.py).

    run() ─► queue per kind (unbounded, cheap) ─► a zygote with a free slot ─► child ─► ExecutionResult
                  ▲ at most `max_running` slots                                │ │
                  │                                                            │ └─ longer than 50 ms: aside (aside.py)
                  └── retried once when its zygote died ◄───────────────────────┘   then INFRA

Of those that wait the newest begin first, and in every fourth turn the oldest: a few calls that come behind a thousand of
somebody else's are not the last, and nobody waits for ever.

Kinds: "math" (numpy, sympy) and "data" (scipy, pandas, matplotlib too), chosen by the imports in the code. Time spent in
the queue counts against no limit. A zygote that dies is replaced; one that has started many snippets is retired when
idle. Nothing that a snippet does raises here.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torl_mega.config import SandboxConfig
from torl_mega.errors import ServerError
from torl_mega.sandbox import tiers
from torl_mega.sandbox.aside import TICK_S, Aside, available_mb
from torl_mega.sandbox.capture import Capture
from torl_mega.sandbox.fetch import read_back
from torl_mega.sandbox.host import ZygoteDied, ZygoteHandle
from torl_mega.sandbox.jail import payload
from torl_mega.sandbox.metrics import Metrics
from torl_mega.sandbox.tiers import PoolSetup
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus

# one blank and a lazy star: the time stays linear in a program that is made to be slow to look at
_DATA_IMPORT = re.compile(rb"^[ \t]*(?:from|import)[ \t][^#\n]*?\b(?:scipy|pandas|matplotlib)\b", re.MULTILINE)
_LOOK_BYTES = 1 << 18
_RETRIES = 1
_TURNS = 4
_START_TRIES = 5
_SELF_TEST = """import wave, quopri
for name in ("numpy", "sympy"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
print("ready")
"""  # modules that are not preloaded must be readable; a library that is not installed is only reported


@dataclass
class _Kind:
    name: str
    waiting: deque[tuple[int, asyncio.Future[ZygoteHandle]]] = field(default_factory=deque)
    zygotes: list[ZygoteHandle] = field(default_factory=list)
    starting: int = 0
    failures: int = 0


class SandboxPool:
    """`async with SandboxPool(config) as pool: result = await pool.run(request)`."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.setup: PoolSetup | None = None
        self._kinds: dict[str, _Kind] = {}
        self._running = 0
        self._aside = Aside(0, 0)
        self._memory_watch: asyncio.Task[None] | None = None
        self._num_slots = 0  # as far as memory allows
        self._turn = 0  # of those that wait: the oldest in turn 0, the newest in the others
        self._order = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -------------------------------------------------------------------------------------------- life

    async def start(self) -> PoolSetup:
        """Finds the strongest tier that works here and starts the zygotes. Raises ServerError when none does."""
        reasons = []
        for tier in tiers.order(self.config):
            try:
                return await self._start_tier(tier)
            except ServerError as e:
                reasons.append(str(e))
                await self._clear()
        raise ServerError("no sandbox tier works here: " + "; ".join(reasons))

    async def _start_tier(self, tier: str) -> PoolSetup:
        setup = self.setup = await asyncio.to_thread(tiers.set_up, self.config, tier)
        self._kinds = {name: _Kind(name) for name in setup.kinds}
        self._aside = Aside(self.config.max_aside, len(os.sched_getaffinity(0)))
        self._num_slots = setup.max_running
        zygote = self._make_zygote("math")
        self._kinds["math"].zygotes.append(zygote)
        ready = await zygote.start()
        setup.note_ready(ready)
        check = await self.run(ExecutionRequest(_SELF_TEST, wall_s=20.0, cpu_s=20.0))
        if check.stdout != "ready\n":
            said = (check.stderr.strip().splitlines() or [check.message or check.status.value])[-1]
            raise ServerError(f"sandbox tier {tier}: the first snippet failed: {said}")
        self.metrics = Metrics()  # the self-test is no call
        self._start_missing()
        return setup

    async def close(self) -> None:
        """Kills what runs, answers what waits with INFRA, and leaves no process and no file behind."""
        self._closed = True
        await self._clear()

    async def _clear(self) -> None:
        for kind in self._kinds.values():
            for _, ticket in kind.waiting:
                if not ticket.done():
                    ticket.set_exception(ServerError("the sandbox is shutting down"))
            kind.waiting.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(z.stop() for k in self._kinds.values() for z in k.zygotes))
        self._kinds = {}
        if self.setup is not None:
            await asyncio.to_thread(self.setup.remove_scratch)
            self.setup = None

    def _background(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _make_zygote(self, kind: str) -> ZygoteHandle:
        assert self.setup is not None
        zygote = ZygoteHandle(kind, self.setup.settings(kind))
        zygote.on_long = lambda snippet: self._set_aside(snippet, zygote)
        return zygote

    async def _start_zygote(self, kind: _Kind) -> None:
        """One more zygote of this kind; tries again, more slowly each time, while callers wait for one."""
        assert self.setup is not None
        kind.starting += 1
        zygote = self._make_zygote(kind.name)
        try:
            await zygote.start()
        except ServerError as e:
            kind.failures += 1
            await zygote.stop()
            if kind.failures >= _START_TRIES and all(z.dead for z in kind.zygotes):
                self._refuse(kind, e)
            await asyncio.sleep(0.2 * kind.failures)
        except asyncio.CancelledError:
            await zygote.stop(0.0)
            raise
        else:
            kind.failures = 0
            kind.zygotes.append(zygote)
        finally:
            kind.starting -= 1
        self._dispatch()

    def _refuse(self, kind: _Kind, error: ServerError) -> None:
        """Zygotes of this kind do not come up any more: waiting callers are told instead of hanging."""
        kind.failures = 0
        while kind.waiting:
            _, ticket = kind.waiting.popleft()
            if not ticket.done():
                ticket.set_exception(error)

    # -------------------------------------------------------------------------------------------- admission

    @property
    def num_waiting(self) -> int:
        return sum(len(k.waiting) for k in self._kinds.values())

    @property
    def num_running(self) -> int:
        return self._running

    async def _admit(self, name: str) -> ZygoteHandle:
        kind = self._kinds[name]
        ticket: asyncio.Future[ZygoteHandle] = asyncio.get_running_loop().create_future()
        kind.waiting.append((next(self._order), ticket))
        self._dispatch()
        try:
            return await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
                self._release(ticket.result())
            raise

    def _release(self, zygote: ZygoteHandle) -> None:
        self._running -= 1
        zygote.reserved -= 1
        self._reap_or_recycle(zygote)
        self._take_aside()

    def _set_aside(self, snippet: int, zygote: ZygoteHandle) -> None:
        self._aside.note_long(snippet, zygote)
        self._take_aside()

    def _take_aside(self) -> None:
        self._running -= self._aside.take()
        if self._aside and (self._memory_watch is None or self._memory_watch.done()):
            self._memory_watch = asyncio.get_running_loop().create_task(self._watch_memory())
            self._tasks.add(self._memory_watch)
            self._memory_watch.add_done_callback(self._tasks.discard)
        self._dispatch()

    async def _watch_memory(self) -> None:
        while self._aside:
            assert self.setup is not None
            self._num_slots = self._aside.balance(available_mb(), self.setup.max_running)
            self._dispatch()
            await asyncio.sleep(TICK_S)
        if self.setup is not None:
            self._num_slots = self.setup.max_running
        self._dispatch()

    def _reap_or_recycle(self, zygote: ZygoteHandle) -> None:
        """Removes a dead zygote; recycles one after `recycle_after` snippets, starting its replacement first."""
        kind = self._kinds.get(zygote.kind)
        if kind is None or zygote not in kind.zygotes:
            return
        if zygote.dead:
            kind.zygotes.remove(zygote)
            self.metrics.zygote_deaths.labels(kind.name).inc()
            self._background(self._kill_and_reap(zygote))
        elif zygote.retiring and zygote.reserved == 0:
            kind.zygotes.remove(zygote)
            self._background(zygote.stop())
        elif zygote.num_started >= self.config.recycle_after and not zygote.replacing:
            zygote.replacing = True
            self._background(self._replace(kind, zygote))

    async def _replace(self, kind: _Kind, old: ZygoteHandle) -> None:
        await self._start_zygote(kind)
        old.retiring = True
        self._reap_or_recycle(old)

    async def _kill_and_reap(self, zygote: ZygoteHandle) -> None:
        zygote.kill()
        await zygote.reap()

    def _dispatch(self) -> None:
        if self._closed or self.setup is None:
            return
        if any(not k.zygotes or any(z.dead for z in k.zygotes) for k in self._kinds.values()):
            self._start_missing()
        while self._running < self._num_slots:
            end, sign = (-1, -1) if self._turn else (0, 1)
            best: tuple[int, _Kind, ZygoteHandle] | None = None
            for kind in self._kinds.values():
                while kind.waiting and kind.waiting[end][1].done():
                    del kind.waiting[end]
                if not kind.waiting:
                    continue
                zygote = self._zygote_for(kind)
                if zygote is not None and (best is None or sign * kind.waiting[end][0] < best[0]):
                    best = (sign * kind.waiting[end][0], kind, zygote)
            if best is None:
                return
            _, kind, zygote = best
            _, ticket = kind.waiting[end]
            del kind.waiting[end]
            self._turn = (self._turn + 1) % _TURNS
            self._running += 1
            zygote.reserved += 1
            ticket.set_result(zygote)

    def _zygote_for(self, kind: _Kind) -> ZygoteHandle | None:
        """The least loaded zygote with a free slot."""
        free = [z for z in kind.zygotes if z.has_room]
        return min(free, key=lambda z: z.reserved) if free else None

    def _start_missing(self) -> None:
        """Starts the zygotes that should run and do not: further kinds after the first, and replacements of dead ones."""
        assert self.setup is not None
        for kind in self._kinds.values():
            for zygote in [z for z in kind.zygotes if z.dead and z.reserved == 0]:
                self._reap_or_recycle(zygote)
            alive = sum(not z.dead for z in kind.zygotes)
            for _ in range(self.setup.kinds[kind.name].num_zygotes - alive - kind.starting):
                self._background(self._start_zygote(kind))

    # -------------------------------------------------------------------------------------------- running

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        """Runs one program under its limits. INFRA only for what the program cannot bring about."""
        if self._closed or self.setup is None:
            return ExecutionResult.infra("the sandbox is not running")
        try:
            code = request.code.encode("utf-8", "surrogatepass")
            data = payload.pack(code, request.stdin.encode("utf-8", "surrogatepass"), request.files)
        except ValueError as e:
            return ExecutionResult.infra(str(e))
        name = "data" if "data" in self._kinds and _DATA_IMPORT.search(code, 0, _LOOK_BYTES) else "math"
        waited = asyncio.get_running_loop().time()
        result = ExecutionResult.infra("never started")
        for attempt in range(1 + _RETRIES):
            try:
                zygote = await self._admit(name)
            except ServerError as e:
                result = ExecutionResult.infra(str(e))
                break
            self.metrics.queue_s.observe(asyncio.get_running_loop().time() - waited)
            try:
                result = await self._once(zygote, request, data)
            except ZygoteDied:
                result = ExecutionResult.infra("the snippet's zygote died")
            finally:
                self._release(zygote)
            if result.status is not ExecutionStatus.INFRA:
                break
            if attempt < _RETRIES:
                self.metrics.retries.inc()
        self.metrics.observe(result)
        return result

    async def _once(self, zygote: ZygoteHandle, request: ExecutionRequest, data: bytes) -> ExecutionResult:
        request_id = next(self._order)
        limits = self._limits(request)
        kept = min(max(request.output_bytes, 2), self.config.max_output_bytes)
        flood = max(self.config.flood_bytes, 2 * kept)
        theirs: list[int] = []
        captures: list[Capture] = []
        box: socket.socket | None = None
        try:
            try:
                theirs.append(payload.to_memfd(data))
                for _ in range(2):
                    r, w = os.pipe2(os.O_CLOEXEC)
                    os.set_blocking(r, False)
                    theirs.append(w)
                    captures.append(Capture(r, kept, flood, lambda: zygote.order(request_id, "output")))
                if request.fetch_files:
                    box, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                    theirs.append(other.detach())
                job = zygote.submit(request_id, limits, theirs)
            finally:
                for fd in theirs:
                    os.close(fd)
            answer = await self._answer(zygote, request_id, job)
            stdout, stderr = (c.finish() for c in captures)
            files: Mapping[str, bytes] = {}
            if box is not None:
                files = await asyncio.to_thread(read_back, box, request.fetch_files, self.config.max_fetch_bytes)
            return _result(answer, limits, stdout, stderr, files)
        except OSError as e:
            return ExecutionResult.infra(f"the pool could not run a snippet: {e}")
        finally:
            if self._aside.leave(request_id):
                self._running += 1  # the caller takes one off for every snippet, also for one that was counted aside
            for capture in captures:
                capture.close()
            if box is not None:
                box.close()
                zygote.discard_box(request_id)

    async def _answer(
        self, zygote: ZygoteHandle, request_id: int, job: asyncio.Future[dict[str, Any]]
    ) -> dict[str, Any]:
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            zygote.order(request_id, "cancel")
            await asyncio.wait([job], timeout=1.0)
            raise

    def _limits(self, request: ExecutionRequest) -> dict[str, Any]:
        c = self.config
        assert self.setup is not None
        return {
            "wall_s": min(max(request.wall_s, 0.001), c.max_wall_s),
            "cpu_s": min(max(request.cpu_s, 0.001), c.max_wall_s),
            "memory_mb": min(max(request.memory_mb, 1), c.max_memory_mb),
            "nproc": self.setup.nproc(),
        }


def _result(
    answer: dict[str, Any], limits: dict[str, Any], stdout: str, stderr: str, files: Mapping[str, bytes]
) -> ExecutionResult:
    if "infra" in answer:
        return ExecutionResult.infra(answer["infra"])
    status, code = _verdict(answer, limits)
    rss_mb = answer["rss_kb"] / 1024
    return ExecutionResult(status, code, stdout, stderr, answer["wall_s"], answer["cpu_s"], rss_mb, files)


def _verdict(answer: dict[str, Any], limits: dict[str, Any]) -> tuple[ExecutionStatus, int | None]:
    """From the wait status and the zygote's own reasons; the program's output has no say."""
    code, killed = answer["code"], answer["killed"]
    sigkill = code == -9
    if killed == "wall" and sigkill:
        return ExecutionStatus.TIMEOUT_WALL, None
    if (killed == "cpu" and sigkill) or (sigkill and answer["cpu_s"] >= limits["cpu_s"]):
        return ExecutionStatus.TIMEOUT_CPU, None
    if killed in ("output", "disk") and sigkill:
        return ExecutionStatus.OUTPUT_LIMIT, None
    if killed == "cancel":
        return ExecutionStatus.INFRA, None
    if code == 1 and answer["memory"]:
        return ExecutionStatus.MEMORY, 1
    if sigkill and answer["rss_kb"] >= 800 * limits["memory_mb"]:
        return ExecutionStatus.MEMORY, None  # the kernel's out-of-memory killer
    if code < 0:
        return ExecutionStatus.SIGNAL, code
    return (ExecutionStatus.OK if code == 0 else ExecutionStatus.ERROR), code
