"""Token-in/token-out client of SGLang servers: spreads requests, and retries elsewhere when a server fails.

    request ─► pick a server ─► POST /generate ─► check ─► Generation
                  ▲  (sticky per prefix,               │
                  │   least outstanding)               ├─ partial (aborted): go on from the tokens so far
                  │                                    ├─ queue full (503): the same again, a little later
                  └────────── another try ◄────────────┴─ dead, hanging, 5xx, wrong version: from the same tokens

With `serving.router` an sglang-router picks the server; retries go through it too, and it drops a dead server by itself.
Contract: every token was sampled by a version the caller expects, and has its log-prob and its policy version.
Limits: one event loop; text is SGLang's own decoding, so a token may run past the stop string it completes (its ids are
kept as sampled). Without streaming a dead server's unfinished tokens are lost and sampled again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import aiohttp
import numpy as np
import orjson

from torl_mega.config import ServingConfig
from torl_mega.errors import GenerationError
from torl_mega.layout import ModelShape
from torl_mega.process.secret import authorization
from torl_mega.serving.fleet import Fleet, Server
from torl_mega.serving.generation import BadAnswer, GenerationPart, RoutesWanted, parse_answer, seam_suffixes
from torl_mega.types import FinishReason, Generation, GenerationRequest

KEEPALIVE_S = 2.0  # uvicorn closes idle connections after 5 s; writing on one of those is a reset
ABORT_GRACE_S = 5.0  # from /abort_request to the partial answer
BACKOFF_S = (0.1, 0.5, 2.0)  # before another try at a server that answers, but with an error
BUSY_S = 0.5  # before another try at a server whose queue is full
MAX_EMPTY_ABORTS = 64  # a request sent back before its first token, as an aborting pause does to queued ones
FIRST = asyncio.FIRST_COMPLETED


class _Refused(Exception):
    """The server says the request itself is wrong (HTTP 400): trying again cannot help."""


class _Busy(Exception):
    """The server's queue is full (HTTP 503, from `--max-queued-requests` or while it shuts down)."""


class SGLangClient:
    """A `Generator` over servers known by URL. Use as an async context manager, or `start` and `close`."""

    def __init__(
        self, urls: Sequence[str], config: ServingConfig, *, vocab_size: int, shape: ModelShape | None = None
    ) -> None:
        """`shape`: of the model, for requests that want to know the experts of their tokens."""
        self.counters: Counter[str] = Counter()
        self._config = config
        self._vocab_size, self._shape = vocab_size, shape
        self._fleet = Fleet(urls, self.counters, self._accepts, hang_timeout_s=config.hang_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._oldest: int | None = None
        self._newest: int | None = None
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def num_up(self) -> int:
        """Servers that may be used now."""
        return len(self._fleet.up())

    async def start(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            headers=authorization(),
        )
        self._fleet.start(self._session)
        return self

    async def close(self) -> None:
        await self._fleet.close()
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=ABORT_GRACE_S)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    def expect_version(self, version: int | None, *, oldest: int | None = None) -> None:
        """Tokens must come from versions oldest..version (`oldest` None: that version alone); None accepts any."""
        self._newest, self._oldest = version, version if oldest is None else oldest

    # -------------------------------------------------------------------------------------------- generation

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one continuation. Raises GenerationError when the request is wrong or every try failed."""
        self._check(request)
        parts: list[GenerationPart] = []
        causes: list[str] = []
        num_empty, patience = 0, time.monotonic() + self._config.request_timeout_s
        while len(causes) <= self._config.max_retries and num_empty < MAX_EMPTY_ABORTS:
            server = await self._fleet.pick(request.route_key, self._config.request_timeout_s)
            try:
                part = await self._one_try(server, request, parts)
            except _Refused as exc:
                raise GenerationError(f"{server.url} refused the request: {exc}") from None
            except _Busy as exc:
                if time.monotonic() > patience:
                    raise GenerationError(f"{server.url} stayed full for {self._config.request_timeout_s:g} s") from exc
                self.counters["server_busy"] += 1
                await asyncio.sleep(BUSY_S)
                continue
            except (BadAnswer, aiohttp.ClientError, TimeoutError, OSError) as exc:
                await self._fault(server, exc, causes)
                continue
            if part.finish is not FinishReason.ABORT:
                return _joined([*parts, part])
            if not part.token_ids:
                num_empty += 1
                continue
            parts.append(part)
            self.counters["generation_continued"] += 1
            if sum(len(p.token_ids) for p in parts) >= request.max_new_tokens:
                return _joined(parts, FinishReason.LENGTH)
        raise GenerationError(f"generation failed, {num_empty} times sent back empty: {'; '.join(causes)}")

    def _check(self, request: GenerationRequest) -> None:
        """Ids outside the vocabulary end the whole server process on a CPU, so they never leave this one."""
        if not request.token_ids:
            raise GenerationError("generation request without tokens; a prompt needs at least one")
        lowest, highest = min(request.token_ids), max(request.token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            bad = lowest if lowest < 0 else highest
            raise GenerationError(f"token id {bad} is outside the vocabulary of {self._vocab_size}; wrong tokenizer?")

    async def _fault(self, server: Server, exc: Exception, causes: list[str]) -> None:
        """Counts a failed try. A server that is gone, hangs or has other weights is suspended; others get a short pause."""
        kind = exc.kind if isinstance(exc, BadAnswer) else "hang" if isinstance(exc, TimeoutError) else "server_down"
        self.counters["generation_retry"] += 1
        self.counters[kind] += 1
        causes.append(f"{server.url}: {kind}: {exc or type(exc).__name__}")
        if kind in ("server_down", "wrong_version", "hang") and self._config.router is None:
            self._fleet.suspend(server, kind)
        else:
            await asyncio.sleep(BACKOFF_S[min(len(causes), len(BACKOFF_S)) - 1])

    async def _one_try(self, server: Server, request: GenerationRequest, parts: list[GenerationPart]) -> GenerationPart:
        """One POST, whose prompt goes on with what earlier parts sampled. Raises on anything but a usable answer."""
        done = tuple(i for part in parts for i in part.token_ids)
        suffixes = seam_suffixes("".join(part.text for part in parts), request.stop)
        routes = self._routes_wanted(request, parts)
        rid = uuid.uuid4().hex
        body = {
            "rid": rid,
            "input_ids": [*request.token_ids, *done],
            "sampling_params": {
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_new_tokens": request.max_new_tokens - len(done),
                "stop": [*request.stop, *suffixes],
                **({"stop_token_ids": list(request.stop_token_ids)} if request.stop_token_ids else {}),
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "sampling_seed": request.seed,
            },
            "return_logprob": True,
            # a namespace of the prefix cache: what weights older than `oldest` computed is never read, flushed or not
            "extra_key": None if self._newest is None else str(self._newest),
            **({} if routes is None else {"return_routed_experts": True, "routed_experts_start_len": routes.start}),
        }
        with server.holding() as lost:
            answer = asyncio.ensure_future(self._post(self._config.router or server.url, "/generate", body))
            try:
                await asyncio.wait({answer, lost}, timeout=self._config.request_timeout_s, return_when=FIRST)
                if not answer.done() and not lost.done():
                    await self._abort(server, rid)
                    await asyncio.wait({answer, lost}, timeout=ABORT_GRACE_S, return_when=FIRST)
                if not answer.done():
                    raise TimeoutError(f"no answer within {self._config.request_timeout_s:g} s")
                status, payload = answer.result()
            except asyncio.CancelledError:
                self._abort_later(server, rid)
                raise
            finally:
                if not answer.done():
                    answer.cancel()
        if status == 400:
            raise _Refused(_message(payload))
        if status == 503:
            raise _Busy
        if status != 200:
            raise BadAnswer("server_error", f"HTTP {status}: {_message(payload)}")
        part = parse_answer(payload, request, suffixes, budget=request.max_new_tokens - len(done), routes=routes)
        self._check_versions(part)
        if part.retracted and part.routes is not None:
            self.counters["routes_of_retracted"] += 1
        return part

    def _routes_wanted(self, request: GenerationRequest, parts: Sequence[GenerationPart]) -> RoutesWanted | None:
        """The experts that are not known yet, those of the last token of an earlier part too."""
        if request.routes_from is None:
            return None
        assert self._shape is not None
        assert self._shape.experts is not None, "a model without experts has no routes"
        known = sum(len(part.routes) for part in parts if part.routes is not None)
        num_input = len(request.token_ids) + sum(len(part.token_ids) for part in parts)
        return RoutesWanted(request.routes_from + known, num_input, self._shape.num_layers, self._shape.experts)

    def _accepts(self, version: int) -> bool:
        if self._newest is None or self._oldest is None:
            return True
        return self._oldest <= version <= self._newest

    def _check_versions(self, part: GenerationPart) -> None:
        for version in set(part.policy_versions):
            if not self._accepts(version):
                wanted = f"{self._newest}" if self._oldest == self._newest else f"{self._oldest}..{self._newest}"
                raise BadAnswer("wrong_version", f"tokens of policy version {version}, expected {wanted}")

    # -------------------------------------------------------------------------------------------- HTTP

    async def _post(self, url: str, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        assert self._session is not None, "SGLangClient.start was not awaited"
        headers = {"Content-Type": "application/json"}
        async with self._session.post(url + path, data=orjson.dumps(body), headers=headers) as answer:
            return answer.status, await answer.read()

    async def _abort(self, server: Server, rid: str) -> None:
        """Tells the server to stop sampling `rid`. A router neither passes this on nor says which server has the request,
        so every server behind it is told."""
        urls = [server.url] if self._config.router is None else [s.url for s in self._fleet.up()]
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            calls = asyncio.gather(*(self._post(url, "/abort_request", {"rid": rid}) for url in urls))
            await asyncio.wait_for(calls, ABORT_GRACE_S)

    def _abort_later(self, server: Server, rid: str) -> None:
        """Aborts in the background: the caller was cancelled and cannot wait for it."""
        task = asyncio.ensure_future(self._abort(server, rid))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)


def _joined(parts: list[GenerationPart], finish: FinishReason | None = None) -> Generation:
    return Generation(
        token_ids=tuple(i for p in parts for i in p.token_ids),
        logprobs=tuple(x for p in parts for x in p.logprobs),
        policy_versions=tuple(v for p in parts for v in p.policy_versions),
        text="".join(p.text for p in parts),
        finish=finish or parts[-1].finish,
        routes=np.concatenate(routes) if (routes := [p.routes for p in parts if p.routes is not None]) else None,
    )


def _message(payload: bytes) -> str:
    with contextlib.suppress(ValueError):
        tree = orjson.loads(payload)
        error = tree.get("error", tree) if isinstance(tree, dict) else tree
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    return payload.decode(errors="replace")[:500]
