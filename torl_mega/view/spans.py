"""A trajectory as spans of text that a page can show: who wrote each token, how likely it was, under which weights.

Contract: pure text and numbers, no HTML; `visible` makes every character that could act on a terminal or reorder a line
(controls, ANSI escapes, bidi marks, zero-width characters, lone surrogates) show as a printable stand-in.
Limits: without a tokenizer a turn is one span; with one, tokens that share a character are one span.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torl_mega.types import Trajectory, Turn

Decode = Callable[[Sequence[int]], str]
Kind = Literal["prompt", "sampled", "inserted"]

SURPRISE = (0.9, 0.5, 0.2, 0.05, 0.01)  # probabilities that bound the shades 0 (expected) to 5 (hardly possible)
MAX_TOKENS_PER_SPAN = 8  # a character has at most four bytes; more means bytes that never make one


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text with one origin."""

    text: str
    kind: Kind
    shade: int = 0  # 0..5, only of sampled tokens
    title: str = ""


def visible(text: str) -> str:
    """`text` with nothing in it that is invisible or acts, but line feeds and tabs."""
    return "".join(_shown(ch) for ch in text)


def _shown(ch: str) -> str:
    code = ord(ch)
    if ch in "\n\t" or (code >= 0x20 and ch.isprintable()):
        return ch
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(ch) in ("Zs", "Co"):
        return ch
    return f"⟨U+{code:04X}⟩"


def spans_of(trajectory: Trajectory, decode: Decode | None) -> list[Span]:
    """Prompt, sampled and inserted text in order. Without `decode` the prompt is its problem and a turn is one span."""
    prompt = trajectory.prompt
    head = decode(prompt.token_ids) if decode else prompt.problem.problem
    spans = [Span(visible(head), "prompt", title=f"prompt · {len(prompt.token_ids)} tokens")]
    for number, turn in enumerate(trajectory.turns, 1):
        spans += _sampled(turn, decode) if decode else [_whole(turn, number)]
        if turn.tool_call is not None and turn.observation_ids:
            title = f"inserted after turn {number} · {len(turn.observation_ids)} tokens · never trained"
            said = decode(turn.observation_ids) if decode else "".join(call.observation for call in turn.tool_calls)
            spans.append(Span(visible(said), "inserted", title=title))
    return spans


def _sampled(turn: Turn, decode: Decode) -> Iterator[Span]:
    for first, last, text in pieces(turn.token_ids, decode):
        logprobs, versions = turn.logprobs[first:last], turn.policy_versions[first:last]
        ids = " ".join(str(i) for i in turn.token_ids[first:last])
        shown = " ".join(f"{x:.3f}" for x in logprobs)
        title = f"token {ids} · log-prob {shown} · p {math.exp(sum(logprobs)):.3f} · version {_versions(versions)}"
        yield Span(visible(text), "sampled", shade(min(logprobs)), title)


def _whole(turn: Turn, number: int) -> Span:
    total = sum(turn.logprobs)
    title = f"turn {number} · {len(turn.token_ids)} tokens · log-prob {total:.2f} · version {_versions(turn.policy_versions)}"
    return Span(visible(turn.text), "sampled", 0, title)


def _versions(versions: Sequence[int]) -> str:
    low, high = min(versions, default=-1), max(versions, default=-1)
    return str(low) if low == high else f"{low} to {high}"


def pieces(token_ids: Sequence[int], decode: Decode) -> Iterator[tuple[int, int, str]]:
    """(first, last, text) of the shortest runs of tokens that decode to whole characters."""
    first = 0
    for last in range(1, len(token_ids) + 1):
        text = decode(token_ids[first:last])
        if text.endswith("\ufffd") and last - first < MAX_TOKENS_PER_SPAN and last < len(token_ids):
            continue
        yield first, last, text
        first = last


def shade(logprob: float) -> int:
    """0 for a token that was expected, up to 5 for one that was hardly possible."""
    probability = math.exp(min(logprob, 0.0)) if not math.isnan(logprob) else 0.0
    return sum(probability < limit for limit in SURPRISE)
