"""Checks answers without blocking the caller: an asyncio client of the grader process in `grader_process.py`.

Contract: `check` returns a verdict for every pair, or `FAULT` when the grader process failed on it twice; it never
raises for what an answer does. An answer that hangs is killed after `timeout_s`; no other answer waits for it. Repeated
pairs are answered from memory; timeouts and faults are not remembered. Nothing of math-verify, of sympy or of a user's
reward function is imported into the caller's process.

One event loop at a time: `start` binds to the running loop, `close` ends the process; then `start` may be called again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter, OrderedDict
from enum import StrEnum
from pathlib import Path
from typing import Any

from torl_mega.errors import ConfigError, TorlError

_CACHE_PAIRS = 65_536
_START_TIMEOUT_S = 120.0
_MAX_REPLY_BYTES = 1 << 24


class Verdict(StrEnum):
    """What the grader process says of one answer."""

    RIGHT = "right"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    FAULT = "fault"


class Grader:
    """`workers` checks run at once, each at most `timeout_s` s and `memory_mb` above the interpreter's own, by `checker`, or
    by `function` (`pkg.module:name`), which `judge` asks."""

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        *,
        memory_mb: int = 1024,
        checker: str = "own",
        function: str | None = None,
    ) -> None:
        options = {"workers": workers, "timeout-s": timeout_s, "memory-mb": memory_mb, "checker": checker}
        options |= {"function": function} if function else {}
        self._options = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._closed = False
        self._cache: OrderedDict[tuple[str, str, str], Verdict] = OrderedDict()
        self.counters: Counter[str] = Counter()

    async def start(self) -> None:
        """Starts the grader process when it does not run. Raises TorlError when it cannot come up."""
        async with self._lock:
            self._closed = False
            await self._ensure_running()

    async def close(self) -> None:
        """Ends the grader process; what is still open becomes a FAULT."""
        async with self._lock:
            self._closed = True
            process, self._process = self._process, None
            if process is None:
                return
            assert process.stdin is not None
            process.stdin.close()  # the process ends its children and itself
            try:
                await asyncio.wait_for(process.wait(), timeout=10)
            except TimeoutError:
                process.kill()
                await process.wait()
            if self._reader is not None:
                await self._reader

    async def check(self, answer: str, gold: str, problem: str = "") -> Verdict:
        """`answers.check.grade` on one answer: RIGHT or WRONG, TIMEOUT when it took too much time or memory, FAULT as above."""
        pair = (answer, gold, problem)
        known = self._cache.get(pair)
        if known is not None:
            self._cache.move_to_end(pair)
            return known
        verdict = Verdict(await self.judge(answer, gold, problem))
        if verdict in (Verdict.RIGHT, Verdict.WRONG):
            self._cache[pair] = verdict
            if len(self._cache) > _CACHE_PAIRS:
                self._cache.popitem(last=False)
        return verdict

    async def judge(self, *arguments: str) -> Any:
        """The outcome of one request (grader_process.py); `fault` when the grader process failed on it twice."""
        outcome = await self._ask(arguments)
        # the grader process itself may have died under it
        return outcome if outcome != Verdict.FAULT else await self._ask(arguments)

    async def _ask(self, arguments: tuple[str, ...]) -> Any:
        async with self._lock:
            if self._closed:
                return Verdict.FAULT
            process = await self._ensure_running()
        assert process.stdin is not None
        identity, self._next_id = self._next_id, self._next_id + 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[identity] = future
        try:
            process.stdin.write(json.dumps([identity, *arguments]).encode() + b"\n")
            with contextlib.suppress(ConnectionError):
                await process.stdin.drain()
            if process.returncode is not None and not future.done():
                return Verdict.FAULT
            return await future
        finally:
            self._open.pop(identity, None)

    async def _ensure_running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await self._spawn()
            self._reader = asyncio.create_task(self._read(self._process))
        return self._process

    async def _spawn(self) -> asyncio.subprocess.Process:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        command = [sys.executable, "-m", "torl_mega.reward.grader_process", *self._options]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_REPLY_BYTES,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        ready = b""
        try:
            with contextlib.suppress(TimeoutError):
                ready = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
        finally:
            if not ready and process.returncode is None:
                process.kill()
        if not ready:
            code = await process.wait()
            raise TorlError(f"the grader process did not come up (exit code {code}); try `{' '.join(command)}`")
        if (said := json.loads(ready)) != "ready":
            await process.wait()
            raise ConfigError(said)
        if self._reader is not None:
            self.counters["grader_restarted"] += 1
        return process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Resolves the future of each reply; when the process ends, those still open become FAULT."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            identity, outcome = json.loads(line)
            future = self._open.pop(identity, None)
            if future is not None and not future.done():
                future.set_result(outcome)
        await process.wait()
        for identity in list(self._open):
            future = self._open.pop(identity)
            if not future.done():
                future.set_result(Verdict.FAULT)
