"""The pool's handle of one zygote: starts the process, sends it snippets, fails their futures when it dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torl_mega.errors import ServerError
from torl_mega.sandbox.jail.confine import ZygoteSettings

PROJECT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[3]); from torl_mega.sandbox.jail.boot import main; "
    "main(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
)
_ENV = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent", "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg",
    "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}  # fmt: skip
START_TIMEOUT_S = 120.0


class ZygoteDied(Exception):
    """The zygote ended with the snippet in flight."""


@dataclass
class Ready:
    missing: list[str]
    landlock: int


_SETUP_S = 30.0  # for the way to its first line, on a machine at its limit
_GRACE_S = 5.0


class ZygoteHandle:
    """A running zygote as the pool sees it. The pool holds `reserved` of its `settings.slots`."""

    def __init__(self, kind: str, settings: ZygoteSettings) -> None:
        self.kind = kind
        self.settings = settings
        self.ready: Ready | None = None
        self.dead = False
        self.retiring = False
        self.replacing = False
        self.num_started = 0
        self.reserved = 0
        self.on_long: Callable[[int], None] = lambda _: None  # gets the id of a snippet that has run for some time
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._looks: dict[int, asyncio.TimerHandle] = {}
        self._here: set[int] = set()  # still running when last looked for
        self._hello: asyncio.Future[dict[str, Any]] | None = None
        self._socket: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def has_room(self) -> bool:
        return not self.dead and not self.retiring and self.ready is not None and self.reserved < self.settings.slots

    async def start(self) -> Ready:
        """Raises ServerError with the zygote's own words when it cannot come up."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._socket = ours
        self._hello = loop.create_future()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-B", "-c", _BOOT, str(theirs.fileno()), json.dumps(asdict(self.settings)), PROJECT],
                pass_fds=[theirs.fileno()], env=_ENV, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        loop.add_reader(ours.fileno(), self._readable)
        try:
            hello = await asyncio.wait_for(self._hello, START_TIMEOUT_S)
        except (TimeoutError, ZygoteDied) as e:
            self.kill()
            raise ServerError(f"a sandbox zygote did not come up ({type(e).__name__}); its stderr says why") from None
        if "failed" in hello:
            self.kill()
            raise ServerError(f"sandbox tier {self.settings.tier}: {hello['failed']}")
        self.ready = Ready(hello["missing"], hello["landlock"])
        return self.ready

    def submit(self, request_id: int, limits: dict[str, Any], fds: list[int]) -> asyncio.Future[dict[str, Any]]:
        """Sends one snippet; the future is its end. Raises ZygoteDied, now or through the future."""
        if self.dead or self._socket is None:
            raise ZygoteDied
        try:
            socket.send_fds(self._socket, [json.dumps({"id": request_id, **limits}).encode()], fds)
        except OSError:  # a full socket too: at most `slots` short messages are ever in flight, so it hangs
            self.kill()
            raise ZygoteDied from None
        self.num_started += 1
        answer = self._pending[request_id] = asyncio.get_running_loop().create_future()
        self._look_after(request_id, limits["wall_s"] + _SETUP_S)
        answer.add_done_callback(lambda _: self._forget(request_id))
        return answer

    def _forget(self, request_id: int) -> None:
        self._pending.pop(request_id, None)
        self._looks.pop(request_id).cancel()
        self._here.discard(request_id)

    def _look_after(self, request_id: int, seconds: float) -> None:
        """A zygote that does not know of a snippet by then hangs, and is killed. (One that is held for memory may take long.)"""
        loop = asyncio.get_running_loop()

        def look() -> None:
            self._here.discard(request_id)
            self.order(request_id, "look")
            self._looks[request_id] = loop.call_later(_GRACE_S, judge)

        def judge() -> None:
            if request_id in self._here:
                self._look_after(request_id, _SETUP_S)
            else:
                self.kill()

        self._looks[request_id] = loop.call_later(seconds, look)

    def order(self, request_id: int, what: str) -> None:
        """`aside`, `hold`, `go` and `look` as in jail/zygote.py; anything else kills the snippet and is the reason."""
        self._send({"do": request_id, "what": what})

    def discard_box(self, request_id: int) -> None:
        """The files have been read back: the zygote removes the snippet's folder."""
        self._send({"discard": request_id})

    def _send(self, message: dict[str, Any]) -> None:
        if not self.dead and self._socket is not None:
            try:
                self._socket.send(json.dumps(message).encode())
            except OSError:
                self.kill()

    def _readable(self) -> None:
        assert self._socket is not None
        while True:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._died()
                return
            message = json.loads(data)
            if "id" not in message:
                if self._hello is not None and not self._hello.done():
                    self._hello.set_result(message)
                continue
            if "here" in message:
                self._here.add(message["id"])
                continue
            if "long" in message:
                self.on_long(message["id"])
                continue
            answer = self._pending.get(message["id"])
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _died(self) -> None:
        if self.dead:
            return
        self.dead = True
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
        waiting = [*self._pending.values(), *([self._hello] if self._hello else [])]
        for future in waiting:
            if not future.done():
                future.set_exception(ZygoteDied())
                future.exception()  # retrieved: nobody may be waiting for the greeting any more

    def kill(self) -> None:
        """Kills the process at once; its children die with it."""
        self._died()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()

    async def stop(self, timeout_s: float = 3.0) -> None:
        """Closes the control socket, on which the zygote kills its children, removes its folder and ends."""
        self._died()
        await self.reap(timeout_s)

    async def reap(self, timeout_s: float = 3.0) -> None:
        if self.process is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.process.poll() is None:
            if loop.time() > deadline:
                os.kill(self.process.pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
