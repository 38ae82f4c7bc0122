"""The pool's unix-socket door: one FrameProtocol per client, one task per call. A client that leaves takes its calls along."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from typing import Any

from torl_mega.errors import ServerError
from torl_mega.sandbox import wire
from torl_mega.sandbox.pool import SandboxPool


class _Connection(wire.FrameProtocol):
    def __init__(self, pool: SandboxPool) -> None:
        super().__init__()
        self.pool = pool
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def frame_received(self, header: dict[str, Any], blob: bytes) -> None:
        match header["op"]:
            case "run":
                task = asyncio.get_running_loop().create_task(self._run(header, blob))
                self.tasks[header["id"]] = task
                task.add_done_callback(lambda _: self.tasks.pop(header["id"], None))
            case "cancel":
                if (task := self.tasks.get(header["id"])) is not None:
                    task.cancel()
            case "ping":
                self.send(wire.frame({"op": "pong"}))

    async def _run(self, header: dict[str, Any], blob: bytes) -> None:
        result = await self.pool.run(wire.parse_request(header, blob))
        self.send(wire.result_frame(header["id"], result))

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self.tasks.values():
            task.cancel()


async def listen(pool: SandboxPool, path: str) -> asyncio.AbstractServer:
    """Listens on `path`, taking over a dead server's socket file. Raises ServerError when a live one holds it."""
    if len(os.fsencode(path)) > 100:
        raise ServerError(
            f"socket path {path!r} is longer than the 100 bytes a unix socket allows; choose a shorter one"
        )
    if os.path.exists(path):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ServerError(f"{path} exists and is no socket; choose another --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise ServerError(f"another sandbox listens on {path}; stop it or choose another --socket")
        os.unlink(path)
    mask = os.umask(0o177)
    try:
        return await asyncio.get_running_loop().create_unix_server(lambda: _Connection(pool), path, backlog=128)
    finally:
        os.umask(mask)
