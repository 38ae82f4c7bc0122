"""Reads one `/generate` answer of SGLang 0.5.23 (srt/entrypoints/http_server.py) into checked records.

Contract: an answer is accepted only when its fields agree: as many log-probs as tokens, each of the token it stands
beside, each finite and not above zero, and version spans that cover all tokens. Anything else is a BadAnswer.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from torl_mega.layout import Experts
from torl_mega.types import FinishReason, GenerationRequest

UNKNOWN_VERSION = -1  # of a server that no sync has reached: it names its weights `default`
MAX_LOGPROB = 1e-4  # log-softmax of a sure token may round to just above 0


class BadAnswer(Exception):
    """An answer that cannot be used; `kind` is the name of its counter."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class GenerationPart:
    """What one request sampled: a whole generation, or its tokens until the server aborted it."""

    token_ids: tuple[int, ...]  # [T]
    logprobs: tuple[float, ...]  # [T]
    policy_versions: tuple[int, ...]  # [T]
    text: str
    finish: FinishReason
    routes: np.ndarray | None = None  # [rows, layers, k] int16
    retracted: bool = False  # it went through the model twice; log-probs are of the first time, experts of the second


def seam_suffixes(text: str, stops: Sequence[str]) -> tuple[str, ...]:
    """What would complete a stop string that the end of `text` has begun.

    A continued request is a new one to the server: it looks for stop strings in its own output alone and would miss one
    that begins before the seam. Sent as extra stop strings; a match counts only where the new text starts with one.
    """
    found: list[str] = []
    for stop in stops:
        found += [stop[k:] for k in range(1, len(stop)) if text.endswith(stop[:k])]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class RoutesWanted:
    """Which experts an answer must name: those of the positions from `start` to the last but one, of `layers` layers."""

    start: int
    num_input: int  # tokens of the request
    layers: int
    experts: Experts

    def parse(self, meta: Mapping[str, Any], num_sampled: int) -> np.ndarray:
        """[rows, layers, k] int16 of an answer's `routed_experts` (srt/state_capturer/routed_experts.py). Raises BadAnswer."""
        encoded = meta.get("routed_experts")
        if encoded is None:
            raise BadAnswer(
                "bad_answer",
                "no routed_experts; start the server with --enable-return-routed-experts",
            )
        shape = (self.num_input + num_sampled - 1 - self.start, self.layers, self.experts.top_k)
        try:
            routes = np.frombuffer(binascii.a2b_base64(encoded), np.int32).reshape(shape)
        except (ValueError, TypeError) as exc:
            raise BadAnswer("bad_answer", f"routed_experts that are not {list(shape)}: {exc}") from None
        if routes.size and not (routes.min() >= 0 and routes.max() < self.experts.count):
            raise BadAnswer("bad_answer", f"routed_experts {routes.min()} to {routes.max()} of {self.experts.count}")
        ordered = np.sort(routes)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise BadAnswer(
                "bad_answer",
                "routed_experts name an expert twice: this MoE backend does not tell its choices; take another "
                "--moe-runner-backend, e.g. triton",
            )
        return routes.astype(np.int16)


def parse_answer(
    payload: bytes,
    request: GenerationRequest,
    suffixes: Sequence[str],
    *,
    budget: int,
    routes: RoutesWanted | None = None,
) -> GenerationPart:
    """Parses and checks one answer, of at most `budget` tokens. Raises BadAnswer when it contradicts itself or the request."""
    try:
        tree = orjson.loads(payload)
        meta = tree["meta_info"]
        ids = tuple(tree["output_ids"])
        triples = meta["output_token_logprobs"] if ids else ()
        logprobs = tuple(float(triple[0]) for triple in triples)
        reason: dict[str, Any] = meta["finish_reason"]
        versions = _versions(meta, len(ids))
        text: str = tree["text"]
        kind = reason["type"]
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        raise BadAnswer("bad_answer", f"not a generation: {exc!r} in {payload[:200]!r}") from None
    if len(ids) > budget:
        raise BadAnswer("bad_answer", f"{len(ids)} tokens, at most {budget} were asked for")
    if tuple(triple[1] for triple in triples) != ids:
        raise BadAnswer("bad_answer", f"log-probs of other tokens than the {len(ids)} that were sampled")
    if not all(math.isfinite(x) and x <= MAX_LOGPROB for x in logprobs):
        raise BadAnswer("bad_answer", "a log-prob is not finite or above zero")
    if kind not in ("stop", "length", "abort"):
        raise BadAnswer("bad_answer", f"unknown finish reason {reason!r}")
    finish = _finish(reason, text, request.stop, suffixes)
    if finish is FinishReason.ABORT and reason.get("err_type") is not None:
        raise BadAnswer("server_error", f"aborted by an error: {reason}")
    if routes is not None and finish is FinishReason.ABORT and "routed_experts" not in meta:
        ids = ()  # aborted in the queue, after it had been taken back: nobody knows the experts of what it had sampled
        logprobs, versions, text = (), (), ""
    experts = routes.parse(meta, len(ids)) if routes is not None and ids else None
    return GenerationPart(ids, logprobs, versions, text, finish, experts, bool(meta.get("num_retractions")))


def _versions(meta: dict[str, Any], num_tokens: int) -> tuple[int, ...]:
    versions: list[int] = []
    for span in meta["weight_versions"]:
        if span["start"] != len(versions):
            raise ValueError(f"version spans {meta['weight_versions']} leave a gap")
        versions += [version_number(span["version"])] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise ValueError(f"version spans {meta['weight_versions']} do not cover {num_tokens} tokens")
    return tuple(versions)


def version_number(version: str) -> int:
    """Of what a server calls its weights; UNKNOWN_VERSION for a name that no trainer gave."""
    return int(version) if version.isdecimal() else UNKNOWN_VERSION


def _finish(reason: dict[str, Any], text: str, stops: Sequence[str], suffixes: Sequence[str]) -> FinishReason:
    if reason["type"] == "length":
        return FinishReason.LENGTH
    if reason["type"] == "abort":
        return FinishReason.ABORT
    matched = reason["matched"]
    if isinstance(matched, int):
        return FinishReason.EOS
    if matched in stops or any(text.startswith(suffix) for suffix in suffixes):
        return FinishReason.STOP_STRING
    return FinishReason.ABORT  # a seam suffix in the middle of the text completes nothing: the client samples on
