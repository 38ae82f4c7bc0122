"""Reads one `/generate` answer of SGLang 0.5.23 (srt/entrypoints/http_server.py) into checked records.

Contract: an answer is accepted only when its fields agree: as many log-probs as tokens, each of the token it stands
beside, each finite and not above zero, and version spans that cover all tokens. Anything else is a BadAnswer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

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


def seam_suffixes(text: str, stops: Sequence[str]) -> tuple[str, ...]:
    """What would complete a stop string that the end of `text` has begun.

    A continued request is a new one to the server: it looks for stop strings in its own output alone and would miss one
    that begins before the seam. Sent as extra stop strings; a match counts only where the new text starts with one.
    """
    found: list[str] = []
    for stop in stops:
        found += [stop[k:] for k in range(1, len(stop)) if text.endswith(stop[:k])]
    return tuple(dict.fromkeys(found))


def parse_answer(payload: bytes, request: GenerationRequest, suffixes: Sequence[str], *, budget: int) -> GenerationPart:
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
    return GenerationPart(ids, logprobs, versions, text, finish)


def _versions(meta: dict[str, Any], num_tokens: int) -> tuple[int, ...]:
    versions: list[int] = []
    for span in meta["weight_versions"]:
        if span["start"] != len(versions):
            raise ValueError(f"version spans {meta['weight_versions']} leave a gap")
        versions += [_version_number(span["version"])] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise ValueError(f"version spans {meta['weight_versions']} do not cover {num_tokens} tokens")
    return tuple(versions)


def _version_number(version: str) -> int:
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
