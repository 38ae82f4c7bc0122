"""SandboxFusion's HTTP interface in front of a pool, over TCP and unix sockets: POST /run_code, GET /v1/ping; and GET /metrics.

Requests, answers, defaults and 422 bodies are those of bytedance/SandboxFusion (sandbox/server/sandbox_api.py, FastAPI),
for the language "python". Other languages are refused with the 422 of an unknown one. `memory_limit_MB` -1 means the
configured default instead of none. A full queue answers 503 with Retry-After. Two request fields are ours, `cpu_timeout`
and `output_bytes`; SandboxFusion ignores them. The exact `ExecutionStatus` travels in the header X-Torl-Status, CPU seconds
and peak memory in X-Torl-Cpu-S and X-Torl-Max-Rss-Mb; the answer's body has SandboxFusion's fields and no other. A client
that closes its connection cancels its snippet. In a run that has a secret (process/secret.py) who does not show it gets 401.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import os
import socket
import stat
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, Field, ValidationError

from torl_mega.errors import ServerError
from torl_mega.process import secret
from torl_mega.sandbox import any_json
from torl_mega.sandbox.pool import SandboxPool
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus

_MAX_BODY = 256 << 20
_OUTPUT_BYTES = 1 << 20  # SandboxFusion's own cap per stream
_BACKLOG = 4096
_METHODS = {"/run_code": ("POST",), "/v1/ping": ("GET", "HEAD"), "/metrics": ("GET", "HEAD")}


class RunCodeRequest(BaseModel):
    compile_timeout: float = 10  # accepted and unused: Python has nothing to compile
    run_timeout: float = Field(10, allow_inf_nan=False)
    memory_limit_MB: int = -1
    code: str
    stdin: str | None = None
    language: Literal["python"]
    files: dict[str, str | None] = {}
    fetch_files: list[str] = []
    args: list[str] = []  # for pytest alone, as in SandboxFusion
    cpu_timeout: float | None = Field(None, allow_inf_nan=False)  # ours; None: run_timeout
    output_bytes: int = _OUTPUT_BYTES  # ours


class HttpServer:
    """`start()` once, then `listen_tcp` and `listen_unix`. On aiohttp's low-level server: routing costs a call 0.1 ms."""

    def __init__(self, pool: SandboxPool) -> None:
        self.pool = pool
        self._open = 0
        server = web.Server(self._handle, request_factory=_request, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)

    async def start(self) -> None:
        await self._runner.setup()

    async def listen_tcp(self, host: str, port: int) -> int:
        """Returns the port in use (`port` 0 takes a free one)."""
        site = web.TCPSite(self._runner, host, port, backlog=_BACKLOG)
        await site.start()
        return site.port

    async def listen_unix(self, path: str) -> None:
        """For this user alone. Takes over a dead server's socket file; raises ServerError when a live one holds it."""
        _make_way(path)
        mask = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, path, backlog=_BACKLOG).start()
        finally:
            os.umask(mask)

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if not secret.shows(request.headers):
            return _json({"detail": "Unauthorized"}, 401, {"WWW-Authenticate": "Bearer"})
        path = request.path.removesuffix("/")  # FastAPI redirects from one to the other
        methods = _METHODS.get(path)
        if methods is None:
            return _json({"detail": "Not Found"}, 404)
        if request.method not in methods:
            return _json({"detail": "Method Not Allowed"}, 405)
        if path == "/run_code":
            return await self._run_code(request)
        if path == "/v1/ping":
            return _json("pong")
        text = self.pool.metrics.text(running=self.pool.num_running, waiting=self.pool.num_waiting)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _run_code(self, request: web.BaseRequest) -> web.Response:
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        try:
            asked = _parse(await request.read())
        except web.HTTPRequestEntityTooLarge as e:
            return _json({"detail": e.reason}, e.status)
        except ValidationError as e:
            return _json({"detail": [_detail(x) for x in e.errors(include_url=False)]}, 422)
        except _BadJson as e:
            return _json({"detail": [e.detail]}, 422)
        if self._open >= self.pool.config.max_queue + self.pool.num_running:
            self.pool.metrics.refused.inc()
            answer = _answer("SandboxError", f"the queue is full ({self._open} requests)")
            return _json(answer, 503, {"Retry-After": "1"})
        try:
            execution = self._execution(asked)
        except ValueError as e:
            return _json(_answer("SandboxError", str(e)))
        self._open += 1
        try:
            result = await self.pool.run(execution)
        finally:
            self._open -= 1
        return _respond(result)

    def _execution(self, asked: RunCodeRequest) -> ExecutionRequest:
        """Raises ValueError for file contents that are not base64."""
        files = {}
        for name, content in asked.files.items():
            if content is None or "IGNORE_THIS_FILE" in name:  # SandboxFusion skips both
                continue
            try:
                files[name] = base64.b64decode(content)
            except binascii.Error as e:
                raise ValueError(f"file {name!r} is not base64: {e}") from None
        config = self.pool.config
        return ExecutionRequest(
            code=asked.code, stdin=asked.stdin or "", files=files, fetch_files=tuple(asked.fetch_files),
            wall_s=asked.run_timeout, cpu_s=asked.run_timeout if asked.cpu_timeout is None else asked.cpu_timeout,
            memory_mb=asked.memory_limit_MB if asked.memory_limit_MB > 0 else config.memory_mb,
            output_bytes=asked.output_bytes,
        )  # fmt: skip


class _BadJson(Exception):
    def __init__(self, detail: dict[str, Any]) -> None:
        self.detail = detail


def _parse(body: bytes) -> RunCodeRequest:
    missing = _BadJson({"type": "missing", "loc": ["body"], "msg": "Field required", "input": None})
    if not body:
        raise missing
    try:
        data = any_json.loads(body, parse_constant=_no_json, parse_float=_finite)
    except (ValueError, RecursionError) as e:  # also broken UTF-8, and integers of more than 4,300 digits
        at, why = (e.pos, e.msg) if isinstance(e, json.JSONDecodeError) else (0, str(e))
        detail = {"type": "json_invalid", "loc": ["body", at], "msg": "JSON decode error", "input": {}}
        raise _BadJson({**detail, "ctx": {"error": why}}) from None
    if data is None:
        raise missing
    return RunCodeRequest.model_validate(data)


def _no_json(word: str) -> None:
    raise ValueError(f"{word} is no JSON")  # and could not be repeated in the answer's `input`


def _finite(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits


def _detail(error: Any) -> dict[str, Any]:
    """One pydantic error in FastAPI's form."""
    if error["type"] == "model_type":
        msg = "Input should be a valid dictionary or object to extract fields from"
        return {"type": "model_attributes_type", "loc": ["body"], "msg": msg, "input": error["input"]}
    out = {"type": error["type"], "loc": ["body", *error["loc"]], "msg": error["msg"], "input": error["input"]}
    if "ctx" in error:
        out["ctx"] = {k: v if isinstance(v, str | int | float) else str(v) for k, v in error["ctx"].items()}
    return out


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=_MAX_BODY)


def _make_way(path: str) -> None:
    """Removes a dead server's socket file. Raises ServerError for a path that cannot be listened on."""
    if len(os.fsencode(path)) > 100:
        raise ServerError(
            f"socket path {path!r} is longer than the 100 bytes a unix socket allows; choose a shorter one"
        )
    if os.path.exists(path):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ServerError(f"{path} exists and is no socket; choose another --socket")
        with socket.socket(socket.AF_UNIX) as caller:
            if caller.connect_ex(path) == 0:
                raise ServerError(f"another sandbox listens on {path}; stop it or choose another --socket")
        os.unlink(path)


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    headers = {"Content-Type": "application/json", **(headers or {})}
    return web.Response(body=any_json.dumps(data), status=status, headers=headers)


def _answer(
    status: str, message: str, run: dict[str, Any] | None = None, files: dict[str, str] | None = None
) -> dict[str, Any]:
    pod = os.environ.get("MY_POD_NAME")
    return {
        "status": status, "message": message, "compile_result": None, "run_result": run, "executor_pod_name": pod,
        "files": files or {},
    }  # fmt: skip


def to_fusion(result: ExecutionResult) -> dict[str, Any]:
    """An ExecutionResult as SandboxFusion would have told it."""
    timeout = result.status in (ExecutionStatus.TIMEOUT_WALL, ExecutionStatus.TIMEOUT_CPU)
    infra = result.status is ExecutionStatus.INFRA
    code = result.return_code
    if code is None and not timeout and not infra:
        code = -9  # killed for memory or output
    run = {
        "status": "TimeLimitExceeded" if timeout else "Error" if infra else "Finished",
        "execution_time": None if infra else result.wall_s,
        "return_code": code,
        "stdout": None if infra else result.stdout,
        "stderr": result.message if infra else result.stderr,
    }
    files = {name: base64.b64encode(content).decode() for name, content in result.files.items()}
    if infra:
        return _answer("SandboxError", result.message, run, files)
    return _answer("Success" if result.status is ExecutionStatus.OK else "Failed", "", run, files)


def _respond(result: ExecutionResult) -> web.Response:
    headers = {
        "X-Torl-Status": result.status.value,
        "X-Torl-Cpu-S": f"{result.cpu_s:.6f}",
        "X-Torl-Max-Rss-Mb": f"{result.max_rss_mb:.3f}",
    }
    return _json(to_fusion(result), headers=headers)
