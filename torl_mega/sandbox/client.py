"""The rollout's door to a pool in another process, over a unix socket. Implements `interfaces.Sandbox`.

Cheap: one connection, one future per call, no thread. Never raises for what happens to the pool: when the connection is
lost, or the pool stops answering pings, every open call is sent once more to whoever listens on the address then, and
becomes INFRA if nobody does. Follows its caller from one event loop to the next (only one at a time).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import Any

from torl_mega.errors import ConfigError, ServerError
from torl_mega.sandbox import wire
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus

_PING_S = 5.0
_SILENCE_S = 30.0  # without any answer, pings included, the pool counts as hung


class _Lost(Exception):
    """The connection ended with the call open."""


class _Connection(wire.FrameProtocol):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.calls: dict[int, asyncio.Future[ExecutionResult]] = {}
        self.last_heard = self.loop.time()
        self.lost = False
        self.greeted: asyncio.Future[None] = self.loop.create_future()
        self.pinger = self.loop.create_task(self._ping())

    def frame_received(self, header: dict[str, Any], blob: bytes) -> None:
        self.last_heard = self.loop.time()
        if not self.greeted.done():
            self.greeted.set_result(None)
        if header["op"] == "result" and (call := self.calls.pop(header["id"], None)) and not call.done():
            call.set_result(wire.parse_result(header, blob))

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            if not self.calls:
                self.last_heard = self.loop.time()
            elif self.loop.time() - self.last_heard > _SILENCE_S:
                assert self.transport is not None
                self.transport.abort()
                return
            self.send(wire.frame({"op": "ping"}))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.pinger.cancel()
        self.greeted.cancel()
        for call in self.calls.values():
            if not call.done():
                call.set_exception(_Lost())
        self.calls.clear()


class SandboxClient:
    """`SandboxClient("unix:/path")`; `start()` waits for the pool, `close()` drops the connection and its open calls."""

    def __init__(self, address: str, *, start_timeout_s: float = 120.0, reconnect_timeout_s: float = 10.0) -> None:
        if not address.startswith("unix:"):
            raise ConfigError(
                f"sandbox address {address!r} is not of the form unix:/path; http addresses need FusionClient"
            )
        self.path = address.removeprefix("unix:")
        self.counters: Counter[str] = Counter()
        self._start_timeout_s = start_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._ids = itertools.count(1)

    async def __aenter__(self) -> SandboxClient:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Raises ServerError when no pool listens within `start_timeout_s`."""
        try:
            self._connection = await self._connect(self._start_timeout_s)
        except OSError as e:
            raise ServerError(
                f"no sandbox listens on unix:{self.path} after {self._start_timeout_s:g} s ({e}); see its log"
            ) from None

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if self._connecting is not None and self._connecting.get_loop() is asyncio.get_running_loop():
            self._connecting.cancel()
        self._connecting = None
        if connection is not None and connection.transport is not None and not connection.loop.is_closed():
            connection.pinger.cancel()
            connection.transport.close()

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        """Runs one program. INFRA when the pool could not be reached, or was lost twice."""
        why = ""
        for attempt in range(2):
            if attempt:
                self.counters["sandbox_resent"] += 1
            try:
                connection = await self._connected()
                result = await self._call(connection, request)
            except _Lost:
                why = "the sandbox pool was lost while the snippet ran"
                continue
            except OSError as e:
                why = f"no sandbox pool listens on unix:{self.path}: {e}"
                break
            if result.status is ExecutionStatus.INFRA:
                self.counters["sandbox_infra"] += 1
            return result
        self.counters["sandbox_infra"] += 1
        return ExecutionResult(ExecutionStatus.INFRA, None, "", "", 0.0, 0.0, 0.0, {}, why)

    async def _call(self, connection: _Connection, request: ExecutionRequest) -> ExecutionResult:
        call_id = next(self._ids)
        future: asyncio.Future[ExecutionResult] = connection.loop.create_future()
        connection.calls[call_id] = future
        connection.send(wire.request_frame(call_id, request))
        try:
            return await future
        except asyncio.CancelledError:
            connection.calls.pop(call_id, None)
            connection.send(wire.frame({"op": "cancel", "id": call_id}))
            raise

    async def _connected(self) -> _Connection:
        """The live connection of the running loop; callers that find none share one attempt to make it."""
        loop = asyncio.get_running_loop()
        connection = self._connection
        if connection is not None and connection.loop is loop and not connection.lost:
            return connection
        if self._connecting is None or self._connecting.get_loop() is not loop or self._connecting.done():
            self._connecting = loop.create_task(self._connect(self._reconnect_timeout_s))
        made = await asyncio.shield(self._connecting)
        self._connection = made
        return made

    async def _connect(self, timeout_s: float) -> _Connection:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                _, connection = await loop.create_unix_connection(_Connection, self.path)
                if await _greet(connection, deadline - loop.time()):
                    return connection
                raise ConnectionResetError("it accepted the connection and did not answer")
            except OSError:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(0.05)


async def _greet(connection: _Connection, timeout_s: float) -> bool:
    """True once the pool has answered: a dying one still accepts connections."""
    connection.send(wire.frame({"op": "ping"}))
    done, _ = await asyncio.wait([connection.greeted], timeout=max(0.1, timeout_s))
    if done and not connection.greeted.cancelled():
        return True
    if connection.transport is not None:
        connection.transport.abort()
    return False
