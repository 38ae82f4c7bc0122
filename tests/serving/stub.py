"""A thin stand-in for SGLang's protocol, for faults that a real server cannot be made to show on demand.

Its answers are shaped like the real ones; `test_stub.py` checks that against a live server. It never decides anything:
each request pops one `Behaviour` from a script, then falls back to plain success.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web
from aiohttp.test_utils import TestServer


@dataclass
class Behaviour:
    """What one request meets. `kind`: ok, http (status), hang, reset, garbage, abort (after `tokens`), or a mangling."""

    kind: str = "ok"
    status: int = 200
    tokens: int | None = None
    edit: Any = None  # called with the answer's tree before it is sent
    text: str | None = None


@dataclass
class Stub:
    version: str = "0"
    script: deque[Behaviour] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    paused: bool = False
    latency_s: float = 0.0
    silent: bool = False  # /server_info hangs, as behind a frozen scheduler
    _server: TestServer | None = None
    _release: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.port}"

    async def __aenter__(self) -> Stub:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/ready", self._model_info)
        self._server = TestServer(app, host="127.0.0.1")
        await self._server.start_server()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._release.set()
        assert self._server is not None
        await self._server.close()

    async def _generate(self, http: web.Request) -> web.Response:
        body = orjson.loads(await http.read())
        self.bodies.append(body)
        act = self.script.popleft() if self.script else Behaviour()
        if act.kind == "hang":
            await self._release.wait()
        if act.kind == "reset":
            assert http.transport is not None
            http.transport.abort()
        if act.kind == "garbage":
            return web.Response(body=b"<html>proxy error</html>")
        if act.kind == "http":
            return web.json_response({"error": {"message": "made to fail"}}, status=act.status)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        tree = self.answer(body, act)
        if act.edit is not None:
            act.edit(tree)
        return web.Response(body=orjson.dumps(tree), content_type="application/json")

    def answer(self, body: dict[str, Any], act: Behaviour) -> dict[str, Any]:
        """A real answer's fields. The sampled ids follow from the context's length, so a seam shows in them."""
        wanted = body["sampling_params"]["max_new_tokens"]
        count = wanted if act.tokens is None else min(act.tokens, wanted)
        ids = [(len(body["input_ids"]) + i) % 97 for i in range(count)]
        finish: dict[str, Any] = {"type": "length", "length": count}
        if act.kind == "abort":
            finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        spans = [{"version": self.version, "start": 0, "end": count}] if count else []
        meta = {
            "id": body["rid"], "finish_reason": finish, "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": count, "cached_tokens": 0, "weight_version": self.version, "weight_versions": spans,
            "output_token_logprobs": [[-random.random(), token, None] for token in ids], "e2e_latency": 0.0,
        }  # fmt: skip
        return {"text": act.text if act.text is not None else "x" * count, "output_ids": ids, "meta_info": meta}

    async def _abort(self, http: web.Request) -> web.Response:
        self.aborted.append((await http.json())["rid"])
        return web.Response()

    async def _model_info(self, _http: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _server_info(self, _http: web.Request) -> web.Response:
        if self.silent:
            await self._release.wait()
        return web.json_response({"tp_size": 1})
