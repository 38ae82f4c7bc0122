"""How good the tiny base model is: attempts at held-out problems as a rollout makes them, in plain PyTorch.

Contract: `faults` measures a model against RANGES, which the model card prints. Independent of the serving engine, so
it can be run wherever the model is made. Limits: the model's programs go through `tiny_base_traces.interpret`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tiny_base_traces import HELD_OUT_SEED, TEMPLATE, interpret

from torl_mega.data.arithmetic import problems
from torl_mega.data.tokenizer import PROBE_TEXT
from torl_mega.rollout.python_tool import NO_CODE, STOP, frame, last_code_block
from torl_mega.types import Problem

NUM_MEASURED = 512  # held-out problems


@dataclass(frozen=True)
class Attempt:
    ids: list[int]  # [T] prompt, sampled, inserted
    mask: list[bool]  # [T] True where sampled
    num_prompt: int
    called: bool
    passed: bool  # its program did not fail
    correct: bool


@torch.no_grad()
def attempts(
    model: Any,
    tokenizer: Any,
    batch: list[Problem],
    *,
    greedy: bool,
    max_tool_calls: int = 1,
    max_new_tokens: int = 128,
    template: str = TEMPLATE,
    execute: Callable[[str], tuple[str, bool]] = interpret,
) -> list[Attempt]:
    """One attempt per problem, rows in lock step: a row still inside its known tokens is fed those. `execute` says what a
    program prints, and whether it did not fail."""
    eos = tokenizer.eos_token_id
    rows = [tokenizer.encode(template.format(problem=p.problem)) for p in batch]
    starts = [len(row) for row in rows]
    masks = [[False] * n for n in starts]
    outputs: list[list[tuple[str, bool]]] = [[] for _ in rows]
    done = [False] * len(rows)
    column, cache, position = [row[0] for row in rows], None, 0
    while not all(done):
        out = model(torch.tensor(column)[:, None], past_key_values=cache, use_cache=True)
        cache, logits, position = out.past_key_values, out.logits[:, -1], position + 1
        sampled = (logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1)[:, 0]).tolist()
        for i, row in enumerate(rows):
            if position < len(row) or done[i]:
                continue
            row.append(sampled[i])
            masks[i].append(True)
            done[i] = sampled[i] == eos
            if len(outputs[i]) < max_tool_calls and not done[i]:
                tail = max(
                    starts[i], len(row) - len(STOP)
                )  # a token is at least one byte, so this holds the stop string
                if tokenizer.decode(row[tail:]).endswith(STOP):
                    code = last_code_block(tokenizer.decode(row[starts[i] :]))
                    outputs[i].append((NO_CODE, False) if code is None else execute(code))
                    inserted = tokenizer.encode(frame(outputs[i][-1][0]))
                    row += inserted
                    masks[i] += [False] * len(inserted)
            done[i] = done[i] or len(row) - starts[i] >= max_new_tokens
        column = [row[position] if position < len(row) else eos for row in rows]
    return [
        Attempt(
            ids=row,
            mask=mask,
            num_prompt=start,
            called=bool(output),
            passed=bool(output) and output[-1][1],
            correct=_boxed(tokenizer.decode(row[start:])) == p.answer,
        )
        for p, row, mask, start, output in zip(batch, rows, masks, starts, outputs, strict=True)
    ]


def _boxed(text: str) -> str | None:
    return text.rpartition("\\boxed{")[2].partition("}")[0] if "\\boxed{" in text else None


@dataclass(frozen=True)
class Quality:
    """Shares over the held-out problems; `pass_ratio` is of the attempts that called the tool."""

    accuracy: float
    code_ratio: float
    pass_ratio: float


# What a model of this recipe measures to, on any machine and with any seed; the model card prints these.
RANGES = {
    "greedy": {"accuracy": (0.0, 0.15), "code_ratio": (0.0, 0.15)},
    "sampled": {"accuracy": (0.15, 0.30), "code_ratio": (0.35, 0.55), "pass_ratio": (0.60, 0.85)},
}


def measure(model: Any, tokenizer: Any, *, greedy: bool) -> Quality:
    torch.manual_seed(0)
    done = attempts(model, tokenizer, list(islice(problems(HELD_OUT_SEED), NUM_MEASURED)), greedy=greedy)
    called = sum(a.called for a in done)
    return Quality(
        accuracy=sum(a.correct for a in done) / len(done),
        code_ratio=called / len(done),
        pass_ratio=sum(a.passed for a in done) / max(called, 1),
    )


def faults(model: Any, tokenizer: Any) -> tuple[dict[str, Quality], list[str]]:
    """Measured quality by decoding, and one line for every range that it misses."""
    measured = {name: measure(model, tokenizer, greedy=name == "greedy") for name in RANGES}
    missed = [
        f"{decoding} {quantity} is {getattr(measured[decoding], quantity):.3f}, the card says {low:.2f} to {high:.2f}"
        for decoding, ranges in RANGES.items()
        for quantity, (low, high) in ranges.items()
        if not low <= getattr(measured[decoding], quantity) <= high
    ]
    if tokenizer.decode(tokenizer.encode(PROBE_TEXT)) != PROBE_TEXT:
        missed.append("the tokenizer loses text: decode(encode(probe)) differs from the probe")
    return measured, missed
