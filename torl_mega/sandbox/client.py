"""The rollout's client of sandbox pools in other processes, ours or SandboxFusion services. Implements `interfaces.Sandbox`.

    run() ─► address with the fewest open calls ─► POST /run_code ─► ExecutionResult
                  ▲                                     │
                  └── sent once more when it was lost ──┘   then INFRA

A call is lost when its connection ends, or when its address answers nothing, pings included, for `silence_s`. An address
that lost a call gets no other one until it answers a ping. A program whose answer is merely late is never run twice.
Cancelling a call closes its connection, on which our own pool stops the snippet. Never raises for what happens to a pool.
Follows its caller from one event loop to the next (only one at a time).

What SandboxFusion cannot say (memory, output limit, CPU time) comes exactly when the service sends our X-Torl headers, and
as `error` or 0.0 otherwise; it ignores our two fields beyond its own, `cpu_timeout` and `output_bytes`.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import aiohttp

from torl_mega.errors import ConfigError, ServerError
from torl_mega.process.secret import authorization
from torl_mega.sandbox import any_json
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus

_CONNECT_S = 10.0
_PING_S = 5.0
_KEEPALIVE_S = 4.0  # uvicorn, below SandboxFusion, closes idle connections after 5 s
_MARGIN_S = 10.0
_MAX_OPEN = 256  # calls sent to one address at once: above what it runs, below what overflows a listen queue


class _Lost(Exception):
    """The call will get no answer."""

    def __init__(self, why: str, *, sent: bool = True) -> None:
        super().__init__(why)
        self.sent = sent  # False: no connection could be made, so nothing ran


class _Address:
    """One pool or service: its connections in the running loop, its open calls, and whether it answers."""

    def __init__(self, text: str, silence_s: float) -> None:
        self.text = text
        self.alive = True  # until a call says otherwise
        self._socket = text.removeprefix("unix:") if text.startswith("unix:") else None
        base = "http://sandbox" if self._socket else text.rstrip("/").removesuffix("/run_code")
        self._run_url, self._ping_url = f"{base}/run_code", f"{base}/v1/ping"
        self._silence_s = silence_s
        self._calls: set[asyncio.Timeout] = set()
        self._last_heard = 0.0
        self._slots = asyncio.Semaphore(_MAX_OPEN)
        self._session: aiohttp.ClientSession | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._reviver: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        return len(self._calls)

    def open(self) -> None:
        """In the running loop, after `leave()`."""
        self._session = self._new_session()
        self._slots = asyncio.Semaphore(_MAX_OPEN)

    def leave(self) -> aiohttp.ClientSession | None:
        """Forgets the loop that was in use; the caller closes the session returned."""
        for task in (self._watcher, self._reviver):
            if task is not None and not task.get_loop().is_closed():
                task.cancel()
        session, self._session = self._session, None
        self._watcher = self._reviver = None
        self.alive, self._calls = True, set()
        return session

    def _new_session(self) -> aiohttp.ClientSession:
        if self._socket:
            connector = aiohttp.UnixConnector(self._socket, limit=0, keepalive_timeout=_KEEPALIVE_S)
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            headers={"Content-Type": "application/json", **authorization()},
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def ping(self, timeout_s: float) -> str:
        """Why nothing answers, on a connection of its own; empty when something does."""
        try:
            async with self._new_session() as session, asyncio.timeout(timeout_s), session.get(self._ping_url):
                return ""
        except (aiohttp.ClientError, OSError) as e:  # OSError: TimeoutError too
            return str(e) or type(e).__name__

    async def post(self, body: bytes, limit_s: float) -> tuple[int, Mapping[str, str], bytes]:
        """The answer's status, headers and body. Raises _Lost, TimeoutError after `limit_s`, or another ClientError."""
        assert self._session is not None
        call = asyncio.timeout(limit_s)
        self._calls.add(call)
        self._watch()
        try:
            async with call, self._slots, self._session.post(self._run_url, data=body) as response:
                data = await response.read()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as e:
            self._revive()
            sent = not isinstance(e, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise _Lost(f"{self.text}: {'lost while the snippet ran, ' * sent}{e!r}", sent=sent) from None
        except TimeoutError:
            if self.alive:
                raise
            raise _Lost(f"{self.text}: silent for {self._silence_s:g} s while the snippet ran") from None
        finally:
            self._calls.discard(call)
        self._last_heard = asyncio.get_running_loop().time()
        return response.status, response.headers, data

    def _watch(self) -> None:
        if self._watcher is None or self._watcher.done():
            loop = asyncio.get_running_loop()
            self._last_heard = loop.time()
            self._watcher = loop.create_task(self._end_calls_on_silence())

    async def _end_calls_on_silence(self) -> None:
        """Runs while calls are open."""
        loop = asyncio.get_running_loop()
        while self._calls:
            await asyncio.sleep(self._silence_s / 6)
            left_s = self._last_heard + self._silence_s - loop.time()
            if left_s > 0:
                if not await self.ping(left_s):
                    self._last_heard = loop.time()
                continue
            self._revive()
            for call in self._calls:
                if not call.expired():
                    call.reschedule(loop.time())
            return

    def _revive(self) -> None:
        if self.alive:
            self.alive = False
            self._reviver = asyncio.get_running_loop().create_task(self._ping_until_it_answers())

    async def _ping_until_it_answers(self) -> None:
        pause_s = 0.02
        while await self.ping(_PING_S):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
        self.alive = True


class SandboxClient:
    """`SandboxClient(["unix:/path"])`, or any number of `http://host:port`; `start()` waits until all of them answer.

    `queue_s` bounds the time that a call may wait at an address before it runs, 503 answers included.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        start_timeout_s: float = 120.0,
        reconnect_timeout_s: float = 10.0,
        silence_s: float = 30.0,
        queue_s: float = 3600.0,
    ) -> None:
        if not addresses or not all(a.startswith(("unix:", "http://", "https://")) for a in addresses):
            raise ConfigError(
                f"sandbox addresses {list(addresses)!r} must be one or more of the form unix:/path or http://host:port"
            )
        self.counters: Counter[str] = Counter()
        self._addresses = [_Address(text, silence_s) for text in addresses]
        self._start_timeout_s = start_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._queue_s = queue_s
        self._turn = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> SandboxClient:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Raises ServerError when an address does not answer within `start_timeout_s`."""
        await self._open()
        try:
            await asyncio.gather(*map(self._wait_for, self._addresses))
        except BaseException:  # a stop request cancels it
            await self.close()
            raise

    async def _wait_for(self, address: _Address) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_s
        while why := await address.ping(max(0.1, deadline - loop.time())):
            if loop.time() > deadline:
                raise ServerError(
                    f"no sandbox listens on {address.text} after {self._start_timeout_s:g} s ({why}); see its log"
                )
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Drops the connections and their open calls."""
        self._loop = None
        await _close(address.leave() for address in self._addresses)

    async def _open(self) -> None:
        """Opens sessions in the running event loop, and closes those of the one before."""
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            left = [address.leave() for address in self._addresses]
            for address in self._addresses:
                address.open()
            await _close(left)

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        """Runs one program. INFRA when no address answered, or the call was lost twice."""
        await self._open()
        result = await self._run(request)
        if result.status is ExecutionStatus.INFRA:
            self.counters["sandbox_infra"] += 1
        return result

    async def _run(self, request: ExecutionRequest) -> ExecutionResult:
        loop = asyncio.get_running_loop()
        begin, body = loop.time(), _body(request)
        lost, why = 0, ""
        while address := await self._pick():
            try:
                limit_s = begin + self._queue_s - loop.time() + request.wall_s + _MARGIN_S
                status, headers, data = await address.post(body, limit_s)
            except _Lost as e:
                lost, why = lost + e.sent, str(e)
                if lost > 1:
                    return ExecutionResult.infra(why)
                if e.sent:
                    self.counters["sandbox_resent"] += 1
                continue
            except (TimeoutError, aiohttp.ClientError) as e:  # no answer within `limit_s`, or one that is no HTTP
                return ExecutionResult.infra(f"{address.text}: {type(e).__name__} {e}")
            if status != 503:
                return _result(address.text, status, headers, data)
            wait_s = _retry_after(headers.get("Retry-After"))
            if loop.time() + wait_s > begin + self._queue_s:
                return ExecutionResult.infra(f"{address.text}: 503, the queue stayed full for {self._queue_s:g} s")
            await asyncio.sleep(wait_s)
        return ExecutionResult.infra(f"no sandbox answered for {self._reconnect_timeout_s:g} s: {why}")

    async def _pick(self) -> _Address | None:
        """The address with the fewest open calls among those alive; None when none is for `reconnect_timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._reconnect_timeout_s
        turn = next(self._turn) % len(self._addresses)
        ring = self._addresses[turn:] + self._addresses[:turn]
        while True:
            if alive := [address for address in ring if address.alive]:
                return min(alive, key=lambda address: address.num_open)
            if loop.time() > deadline:
                return None
            await asyncio.sleep(0.05)


async def _close(sessions: Iterable[aiohttp.ClientSession | None]) -> None:
    for session in sessions:
        if session is not None:
            await session.close()


def _body(request: ExecutionRequest) -> bytes:
    return any_json.dumps(
        {
            "code": request.code, "language": "python", "run_timeout": request.wall_s, "compile_timeout": request.wall_s,
            "memory_limit_MB": request.memory_mb, "stdin": request.stdin or None,
            "files": {name: base64.b64encode(content).decode() for name, content in request.files.items()},
            "fetch_files": request.fetch_files, "cpu_timeout": request.cpu_s, "output_bytes": request.output_bytes,
        }
    )  # fmt: skip


def _retry_after(value: str | None) -> float:
    try:
        return max(0.05, float(value or 1.0))
    except ValueError:
        return 1.0


def _result(address: str, status: int, headers: Mapping[str, str], data: bytes) -> ExecutionResult:
    if status != 200:
        return ExecutionResult.infra(f"{address}: HTTP {status} {data[:500].decode('utf-8', 'replace')}")
    try:
        return _from_fusion(any_json.loads(data), headers)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return ExecutionResult.infra(f"{address}: {type(e).__name__} {e} in the answer {data[:200]!r}")


def _from_fusion(answer: dict[str, Any], headers: Mapping[str, str]) -> ExecutionResult:
    run = answer.get("run_result")
    if answer["status"] == "SandboxError" or run is None:
        return ExecutionResult.infra(answer.get("message") or "SandboxError")
    code = run["return_code"]
    exact = headers.get("X-Torl-Status")
    if exact is not None:
        status = ExecutionStatus(exact)
    elif run["status"] == "TimeLimitExceeded":
        status = ExecutionStatus.TIMEOUT_WALL
    elif code is not None and code < 0:
        status = ExecutionStatus.SIGNAL
    else:
        status = ExecutionStatus.OK if code == 0 else ExecutionStatus.ERROR
    killed = status in (ExecutionStatus.TIMEOUT_WALL, ExecutionStatus.TIMEOUT_CPU, ExecutionStatus.OUTPUT_LIMIT)
    return ExecutionResult(
        status=status,
        return_code=None if killed or (status is ExecutionStatus.MEMORY and code == -9) else code,
        stdout=run.get("stdout") or "",
        stderr=run.get("stderr") or "",
        wall_s=run.get("execution_time") or 0.0,
        cpu_s=float(headers.get("X-Torl-Cpu-S", 0.0)),
        max_rss_mb=float(headers.get("X-Torl-Max-Rss-Mb", 0.0)),
        files={name: base64.b64decode(content) for name, content in (answer.get("files") or {}).items()},
    )
