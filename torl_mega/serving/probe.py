"""Before step 0: do trainer and servers mean the same thing by the same tokens?

A tokenizer that differs, or weights that were mapped wrongly, never show as an error later, only as a policy that does not
learn. So a probe text must survive encoding and decoding on both sides, and must get the same log-probs from both; with
algo.router_replay = rollout by the experts that the server took.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import aiohttp
import numpy as np

from torl_mega.config import Config
from torl_mega.data.tokenizer import PROBE_TEXT
from torl_mega.errors import ServerError
from torl_mega.interfaces import Share, Trainer, Turns
from torl_mega.layout import describe_model, read_hf_config
from torl_mega.process.secret import authorization
from torl_mega.serving.generation import BadAnswer, RoutesWanted
from torl_mega.types import Sample

TIMEOUT_S = 120.0


class TextCodec(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class ServerSide(Protocol):
    """What rank 0 asks the servers with. No URLs: recorded trajectories are replayed, so there is nothing to compare."""

    @property
    def tokenizer(self) -> TextCodec: ...

    @property
    def server_urls(self) -> Sequence[str]: ...

    @property
    def run(self) -> Callable[[Awaitable[Any]], Any]: ...  # to its end, on the event loop of rank 0's clients


def check_engines(trainer: Trainer, rank0: ServerSide | None, config: Config, share: Share, turns: Turns) -> None:
    """Compares every server with the trainer on the probe text, after a sync. Collective; `rank0` is None on other ranks.
    Raises ServerError on every rank, naming the server and what differs."""
    ids = share(lambda: tuple(rank0.tokenizer.encode(PROBE_TEXT)) if rank0 and rank0.server_urls else ())
    if not ids:
        return
    mask = np.arange(len(ids)) > 0  # nothing predicts the first token
    sample = Sample(np.array(ids, np.int64), mask, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int32), 0.0)
    if config.algo.router_replay == "rollout":
        turns.sample()
        sample = replace(sample, routes=share(lambda: rank0 and _routes(rank0, ids, config)))
        turns.sync()
    ours = trainer.score(sample, temperature=1.0)  # as the servers' prompt log-probs are, whatever they sample at
    turns.sample()
    share(lambda: rank0 and _compare(rank0, ids, ours, config))


def _routes(rank0: ServerSide, ids: Sequence[int], config: Config) -> np.ndarray:
    """[T, layers, k] the experts that the first server takes; every server must tell its own."""
    shape = describe_model(read_hf_config(config.model.path))
    assert shape.experts is not None
    wanted = RoutesWanted(0, len(ids), shape.num_layers, shape.experts)
    first, *_ = [rank0.run(prompt_routes(url, ids, wanted)) for url in rank0.server_urls]
    return first


def _compare(rank0: ServerSide, ids: Sequence[int], trainer_logprobs: np.ndarray, config: Config) -> None:
    for url in rank0.server_urls:
        rank0.run(check_tokenizer(url, rank0.tokenizer, PROBE_TEXT))
        check_gap(url, ids, rank0.run(prompt_logprobs(url, ids)), trainer_logprobs, config)


def check_gap(
    url: str, ids: Sequence[int], server_logprobs: np.ndarray, trainer_logprobs: np.ndarray, config: Config
) -> None:
    """Raises ServerError for the token where the two [T] log-probs differ most, if that is above the limit."""
    gap = np.abs(server_logprobs[1:] - trainer_logprobs[1:])
    if not gap.max() <= config.guards.probe_logprob_diff:  # so that NaN does not pass
        at = int(gap.argmax()) + 1
        raise ServerError(
            f"{url} and the trainer disagree on the probe text: token {at} (id {ids[at]}) has log-prob "
            f"{server_logprobs[at]:.4f} there and {trainer_logprobs[at]:.4f} here, guards.probe_logprob_diff is "
            f"{config.guards.probe_logprob_diff:g}; both must load the same weights from {config.model.path}"
        )


async def check_tokenizer(url: str, tokenizer: TextCodec, probe_text: str) -> None:
    """Raises ServerError saying which side differs unless server and `tokenizer` encode alike and both decode back to
    `probe_text`."""
    here = list(tokenizer.encode(probe_text))
    answer = await ask(url, "/tokenize", {"prompt": probe_text, "add_special_tokens": False})
    there = [int(token) for token in answer["tokens"]]
    if there != here:
        at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
        raise ServerError(
            f"{url} and the trainer encode the probe text differently from token {at} on: {there[at : at + 4]} there, "
            f"{here[at : at + 4]} here; both must read the tokenizer of the same folder"
        )
    answer = await ask(url, "/detokenize", {"tokens": here, "skip_special_tokens": False})
    for side, text in ((f"{url} decodes", answer["text"]), ("the trainer's tokenizer decodes", tokenizer.decode(here))):
        if text != probe_text:
            at = next((i for i, (a, b) in enumerate(zip(text, probe_text, strict=False)) if a != b), len(text))
            raise ServerError(
                f"{side} the probe text with a loss: {probe_text[at : at + 12]!r} came back as {text[at : at + 12]!r}; "
                f"the tokenizer files and model_type in config.json do not belong together"
            )


async def prompt_logprobs(url: str, token_ids: Sequence[int]) -> np.ndarray:
    """[T] float32 at temperature 1: position t is log p(token t | tokens < t); position 0 is 0. Raises ServerError."""
    body = {
        "input_ids": list(token_ids),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = await ask(url, "/generate", body)
    triples = answer["meta_info"]["input_token_logprobs"]
    if [triple[1] for triple in triples] != list(token_ids):
        raise ServerError(f"{url} gave log-probs of {len(triples)} other tokens than the {len(token_ids)} of the probe")
    return np.array([0.0, *(triple[0] for triple in triples[1:])], np.float32)


async def prompt_routes(url: str, token_ids: Sequence[int], wanted: RoutesWanted) -> np.ndarray:
    """[T, layers, k] int16 experts of each token, -1 for the last. Raises ServerError for a server that does not tell them."""
    sampling = {"temperature": 1.0, "max_new_tokens": 0}
    answer = await ask(
        url, "/generate", {"input_ids": list(token_ids), "sampling_params": sampling, "return_routed_experts": True}
    )
    try:
        routes = wanted.parse(answer["meta_info"], 0)
    except BadAnswer as exc:
        raise ServerError(f"{url}: {exc}") from None
    return np.concatenate([routes, np.full_like(routes[:1], -1)])


async def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """A server's answer to POST, or to GET without a body. Raises ServerError."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout, headers=authorization()) as session:
            async with session.request("GET" if body is None else "POST", url + path, json=body) as answer:
                if answer.status != 200:
                    raise ServerError(f"{url}{path} answered HTTP {answer.status}: {(await answer.text())[:300]}")
                return await answer.json()
    except (aiohttp.ClientError, TimeoutError, OSError) as exc:
        raise ServerError(f"{url}{path} gave no answer: {exc or type(exc).__name__}") from None
