"""Client for SandboxFusion services (bytedance/SandboxFusion, or our own HTTP door). Implements `interfaces.Sandbox`.

Each call goes to the URL with the fewest calls open. Tried again, on the next URL, only when the connection failed before
an answer came, or on 503 for as long as `queue_s` allows: a program whose answer is merely late is never run twice.
What SandboxFusion cannot say (memory, output limit, CPU time) comes exactly when the service sends our X-Torl headers,
and as `error` or 0.0 otherwise.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp

from torl_mega.errors import ConfigError
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus

_MARGIN_S = 10.0


class FusionClient:
    def __init__(
        self, urls: Sequence[str], *, queue_s: float = 300.0, max_tries: int = 3, max_open: int = 4096
    ) -> None:
        """`queue_s`: how long a request may wait in the service before it runs; a client that gives up at `run_timeout`
        alone throws away what a busy service was about to answer."""
        if not urls or not all(u.startswith(("http://", "https://")) for u in urls):
            raise ConfigError(f"sandbox URLs {list(urls)!r} must be one or more of the form http://host:port")
        self.urls = [u.rstrip("/").removesuffix("/run_code") for u in urls]
        self.counters: Counter[str] = Counter()
        self._queue_s = queue_s
        self._max_tries = max_tries
        self._max_open = max_open
        self._open = dict.fromkeys(self.urls, 0)
        self._turn = itertools.count()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> FusionClient:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        self._session = self._new_session()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _new_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=self._max_open), trust_env=False)

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        """Runs one program. INFRA when no service answered."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._queue_s
        failed, why = 0, ""
        while failed < self._max_tries:
            url = self._pick()
            self._open[url] += 1
            try:
                result, wait_s = await self._post(url, request)
            except (aiohttp.ClientConnectionError, ConnectionError) as e:
                failed, why = failed + 1, f"{url}: {e or type(e).__name__}"
                self.counters["sandbox_resent"] += 1
                await asyncio.sleep(min(0.1 * 2**failed, 2.0))
                continue
            except (TimeoutError, aiohttp.ClientError, ValueError, KeyError, TypeError) as e:
                why = f"{url}: {type(e).__name__} {e}"
                break
            finally:
                self._open[url] -= 1
            if result is not None:
                if result.status is ExecutionStatus.INFRA:
                    self.counters["sandbox_infra"] += 1
                return result
            why = f"{url}: 503, the queue stayed full for {self._queue_s:g} s"
            if loop.time() + wait_s > deadline:
                break
            await asyncio.sleep(wait_s)
        self.counters["sandbox_infra"] += 1
        return ExecutionResult(ExecutionStatus.INFRA, None, "", "", 0.0, 0.0, 0.0, {}, why)

    def _pick(self) -> str:
        turn = next(self._turn)
        ring = self.urls[turn % len(self.urls) :] + self.urls[: turn % len(self.urls)]
        return min(ring, key=self._open.__getitem__)

    async def _post(self, url: str, request: ExecutionRequest) -> tuple[ExecutionResult | None, float]:
        """The result, or None and the seconds to wait when the service is full."""
        if self._session is None or self._session.closed or self._session._loop is not asyncio.get_running_loop():
            self._session = self._new_session()
        body = {
            "code": request.code, "language": "python", "run_timeout": request.wall_s, "compile_timeout": request.wall_s,
            "memory_limit_MB": request.memory_mb, "stdin": request.stdin or None,
            "files": {name: base64.b64encode(content).decode() for name, content in request.files.items()},
            "fetch_files": list(request.fetch_files),
        }  # fmt: skip
        timeout = aiohttp.ClientTimeout(total=self._queue_s + request.wall_s + _MARGIN_S)
        async with self._session.post(f"{url}/run_code", json=body, timeout=timeout) as response:
            if response.status == 503:
                return None, _retry_after(response.headers.get("Retry-After"))
            if response.status != 200:
                text = (await response.text())[:500]
                return _infra(f"{url}: HTTP {response.status} {text}"), 0.0
            return _from_fusion(await response.json(), response.headers), 0.0


def _retry_after(value: str | None) -> float:
    try:
        return max(0.05, float(value or 1.0))
    except ValueError:
        return 1.0


def _infra(message: str) -> ExecutionResult:
    return ExecutionResult(ExecutionStatus.INFRA, None, "", "", 0.0, 0.0, 0.0, {}, message)


def _from_fusion(answer: dict[str, Any], headers: Any) -> ExecutionResult:
    run = answer.get("run_result")
    if answer["status"] == "SandboxError" or run is None:
        return _infra(answer.get("message") or "SandboxError")
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
