"""SandboxFusion's HTTP interface in front of a pool: POST /run_code, GET /v1/ping; and GET /metrics.

Requests, answers, defaults and 422 bodies are those of bytedance/SandboxFusion (sandbox/server/sandbox_api.py, FastAPI),
for the language "python". Other languages are refused with the 422 of an unknown one. `memory_limit_MB` -1 means the
configured default instead of none. A full queue answers 503 with Retry-After. The exact `ExecutionStatus` travels in the
header X-Torl-Status, CPU seconds and peak memory in X-Torl-Cpu-S and X-Torl-Max-Rss-Mb; the body has SandboxFusion's
fields and no other.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, Field, ValidationError

from torl_mega.sandbox.pool import SandboxPool
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus

_MAX_BODY = 256 << 20
_OUTPUT_BYTES = 1 << 20  # SandboxFusion's own cap per stream


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


class HttpServer:
    def __init__(self, pool: SandboxPool) -> None:
        self.pool = pool
        self._open = 0
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[_plain_errors])
        for slash in ("", "/"):  # FastAPI redirects from one to the other
            app.router.add_post("/run_code" + slash, self._run_code)
            app.router.add_get("/v1/ping" + slash, _ping)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)

    async def start(self, host: str, port: int) -> int:
        """Returns the port in use (`port` 0 takes a free one)."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=4096)
        await site.start()
        return self._runner.addresses[0][1]

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self.pool.metrics.text(running=self.pool.num_running, waiting=self.pool.num_waiting)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _run_code(self, request: web.Request) -> web.Response:
        body = await request.read()
        try:
            asked = _parse(body)
        except ValidationError as e:
            return web.json_response({"detail": [_detail(x) for x in e.errors(include_url=False)]}, status=422)
        except _BadJson as e:
            return web.json_response({"detail": [e.detail]}, status=422)
        if self._open >= self.pool.config.max_queue + self.pool.num_running:
            self.pool.metrics.refused.inc()
            answer = _answer("SandboxError", f"the queue is full ({self._open} requests)")
            return web.json_response(answer, status=503, headers={"Retry-After": "1"})
        try:
            execution = self._execution(asked)
        except ValueError as e:
            return web.json_response(_answer("SandboxError", str(e)))
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
            wall_s=asked.run_timeout, cpu_s=max(asked.run_timeout, 0.001),
            memory_mb=asked.memory_limit_MB if asked.memory_limit_MB > 0 else config.memory_mb,
            output_bytes=_OUTPUT_BYTES,
        )  # fmt: skip


class _BadJson(Exception):
    def __init__(self, detail: dict[str, Any]) -> None:
        self.detail = detail


def _parse(body: bytes) -> RunCodeRequest:
    missing = _BadJson({"type": "missing", "loc": ["body"], "msg": "Field required", "input": None})
    if not body:
        raise missing
    try:
        data = json.loads(body, parse_constant=_no_json, parse_float=_finite)
    except (ValueError, RecursionError) as e:  # also broken UTF-8, and integers of more than 4,300 digits
        at, why = (e.pos, e.msg) if isinstance(e, json.JSONDecodeError) else (0, str(e))
        detail = {
            "type": "json_invalid",
            "loc": ["body", at],
            "msg": "JSON decode error",
            "input": {},
            "ctx": {"error": why},
        }
        raise _BadJson(detail) from None
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


async def _ping(_: web.Request) -> web.Response:
    return web.json_response("pong")


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
    return web.json_response(to_fusion(result), headers=headers)


@web.middleware
async def _plain_errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """404, 405 and 413 as FastAPI words them."""
    try:
        return await handler(request)
    except web.HTTPException as e:
        return web.json_response({"detail": e.reason}, status=e.status)
