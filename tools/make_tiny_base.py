"""Makes the quickstart's base model: a 0.4M-parameter Qwen2 that has seen arithmetic answered in text and in Python.

    python tools/make_tiny_base.py --out conf/quickstart            make it (minutes, one core)
    python tools/make_tiny_base.py --check conf/quickstart          measure it against its card's ranges

What it learns to be is what a base model is to ToRL: it knows the form of a tool call, does not favour it, often gets
it wrong, and cannot do the arithmetic without it. Traces are encoded in the very pieces in which a rollout encodes them
(prompt, sampled text up to ```output, observation, the rest), so a rollout meets no token sequence it has not seen.

Contract: same seed and same machine give the same bytes (one thread, fixed data); elsewhere the last bits may differ
and the card's ranges hold. The folder is written beside its final place and swapped in: a killed run leaves the old one.
Limits: `--check` runs the model's programs with `interpret`, which knows +, -, *, assignment and print. Whatever else
the model may write counts as a failed program; nothing it writes is executed by Python.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from torl_mega.data.arithmetic import problems
from torl_mega.types import Problem

TEMPLATE = "Q: {problem}=?\nA:"
CALL = "```output"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # Qwen2's own, after all other ids as in Qwen2
VOCAB_SIZE = 320  # 256 bytes, 61 merges, 3 special tokens; divisible by every tensor-parallel size of the tests
TRAIN_SEED, HELD_OUT_SEED, NUM_HELD_OUT = 10_007, 1000, 1024

Piece = tuple[str, bool]  # text, whether the policy writes it (and the loss counts it)


# ------------------------------------------------------------------------------------------------ traces


class _Failed(Exception):
    """A program of the model failed; the message is the last line of Python's traceback."""


def interpret(code: str) -> str:
    """What Python prints for `code`, or the last line of its traceback, for integer +, -, *, names and print."""
    names: dict[str, int] = {}
    printed: list[str] = []
    try:
        for statement in _parse(code).body:
            match statement:
                case ast.Expr(ast.Call(ast.Name("print"), [argument], [])):
                    printed.append(str(_value(argument, names)))
                case ast.Assign([ast.Name(name)], value):
                    names[name] = _value(value, names)
                case ast.Expr(value):
                    _value(value, names)
                case _:
                    raise _Failed("SyntaxError: invalid syntax")
    except _Failed as failed:
        return str(failed)
    return "\n".join(printed)


def _parse(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise _Failed(f"{type(error).__name__}: {reason}") from error


def _value(node: ast.expr, names: dict[str, int]) -> int:
    match node:
        case ast.Constant(int(number)):
            return number
        case ast.Name(name) if name in names:
            return names[name]
        case ast.Name(name):
            raise _Failed(f"NameError: name '{name}' is not defined")
        case ast.BinOp(left, ast.Add(), right):
            return _value(left, names) + _value(right, names)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(left, names) - _value(right, names)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left, names) * _value(right, names)
        case ast.Call(function):
            return _value(function, names)
        case _:
            raise _Failed("TypeError: unsupported operand")


def observation(output: str) -> str:
    """The observation's text as a rollout inserts it after ```output (arXiv 2503.23383, section 2.2)."""
    return f"\n{output}\n```\n"


@dataclass(frozen=True)
class Mix:
    """Shares of the pre-training traces; what is left of 1 is text without code."""

    good: float = 0.25  # right program, output read right
    misread: float = 0.08  # right program, another answer than its output
    buggy: float = 0.12  # program that fails, then a wrong answer


def trace(problem: Problem, rng: random.Random, mix: Mix) -> list[Piece]:
    """One answer to `problem`, in the pieces in which a rollout would encode it."""
    expression, value = problem.problem, int(problem.answer)
    draw = rng.random()
    if draw >= mix.good + mix.misread + mix.buggy:
        return [(f" It is \\boxed{{{value + rng.choice((-30, -20, -10, -3, -2, -1, 0, 1, 2, 3, 10, 20, 30))}}}.", True)]
    if draw < mix.good + mix.misread:
        code = rng.choice((f"print({expression})",) * 3 + (f"x={expression}\nprint(x)",))
    else:
        code = rng.choice((f"print({expression}", f"print({expression}))", f"x={expression}\nprint(y)"))
    answer = value if draw < mix.good else value + rng.choice((-20, -10, -1, 1, 10, 20))
    return [
        (f"\n```python\n{code}\n```\n{CALL}", True),
        (observation(interpret(code)), False),
        (f"So \\boxed{{{answer}}}.", True),
    ]


def training_problems(seed: int) -> Iterator[Problem]:
    """Endless problems that leave the held-out ones out."""
    held_out = {p.problem for p in islice(problems(HELD_OUT_SEED), NUM_HELD_OUT)}
    return (p for p in problems(TRAIN_SEED + seed) if p.problem not in held_out)


# ------------------------------------------------------------------------------------------------ tokenizer


def make_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Byte-level BPE in Qwen2's own format: AutoTokenizer rebuilds exactly this one from `model_type: qwen2`."""
    rng, source = random.Random(seed), training_problems(seed)
    corpus = [
        TEMPLATE.format(problem=p.problem) + "".join(t for t, _ in trace(p, rng, Mix())) for p in islice(source, 400)
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Recipe:
    num_steps: int = 800
    batch_size: int = 64
    lr: float = 2e-3
    mix: Mix = Mix()


def make_model(eos: int) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def encode_trace(tokenizer: Qwen2Tokenizer, problem: Problem, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Token ids [T] and labels [T] (-100 where the policy does not write), the closing EOS included."""
    ids = tokenizer.encode(TEMPLATE.format(problem=problem.problem))
    labels = [-100] * len(ids)
    for text, written in pieces:
        piece = tokenizer.encode(text)
        ids += piece
        labels += piece if written else [-100] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def batches(tokenizer: Qwen2Tokenizer, recipe: Recipe, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids [B, T], labels [B, T]), padded on the right; causal attention never looks at the padding."""
    rng, source = random.Random(seed), training_problems(seed)
    while True:
        rows = [encode_trace(tokenizer, p, trace(p, rng, recipe.mix)) for p in islice(source, recipe.batch_size)]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), tokenizer.eos_token_id)
        labels = torch.full((len(rows), length), -100)
        for row, (i, y) in enumerate(rows):
            ids[row, : len(i)], labels[row, : len(y)] = torch.tensor(i), torch.tensor(y)
        yield ids, labels


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, recipe: Recipe, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.num_steps, pct_start=0.05)
    start = time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, recipe, seed), recipe.num_steps), start=1):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(
                f"step {step}/{recipe.num_steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True
            )
    model.eval()


# ------------------------------------------------------------------------------------------------ quality


@dataclass(frozen=True)
class Attempt:
    ids: list[int]  # [T] prompt, sampled, inserted
    mask: list[bool]  # [T] True where sampled
    num_prompt: int
    called: bool
    passed: bool  # the program printed something and did not fail
    correct: bool


@torch.no_grad()
def attempts(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    batch: list[Problem],
    *,
    greedy: bool,
    max_tool_calls: int = 1,
    max_new_tokens: int = 128,
) -> list[Attempt]:
    """One attempt per problem, rows in lock step: a row still inside its known tokens is fed those."""
    eos = tokenizer.eos_token_id
    rows = [tokenizer.encode(TEMPLATE.format(problem=p.problem)) for p in batch]
    starts = [len(row) for row in rows]
    masks = [[False] * n for n in starts]
    outputs: list[list[str]] = [[] for _ in rows]
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
                text = tokenizer.decode(row[starts[i] :])
                if text.endswith(CALL):
                    outputs[i].append(interpret(text.rpartition("```python\n")[2].partition("\n```")[0]))
                    inserted = tokenizer.encode(observation(outputs[i][-1]))
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
            passed=bool(output) and bool(output[-1]) and "Error:" not in output[-1],
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


def measure(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, *, greedy: bool, num_problems: int = 512) -> Quality:
    torch.manual_seed(0)
    done = attempts(model, tokenizer, list(islice(problems(HELD_OUT_SEED), num_problems)), greedy=greedy)
    called = sum(a.called for a in done)
    return Quality(
        accuracy=sum(a.correct for a in done) / len(done),
        code_ratio=called / len(done),
        pass_ratio=sum(a.passed for a in done) / max(called, 1),
    )


def faults(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> tuple[dict[str, Quality], list[str]]:
    """Measured quality by decoding, and one line for every range that it misses."""
    measured = {name: measure(model, tokenizer, greedy=name == "greedy") for name in RANGES}
    missed = [
        f"{decoding} {quantity} is {getattr(measured[decoding], quantity):.3f}, the card says {low:.2f} to {high:.2f}"
        for decoding, ranges in RANGES.items()
        for quantity, (low, high) in ranges.items()
        if not low <= getattr(measured[decoding], quantity) <= high
    ]
    probe = "é 漢字 🎉 \x00\x1b[31m \t  x\r\n\r\n   y 1234\n```python\nprint(1)\n```\n```output"
    if tokenizer.decode(tokenizer.encode(probe)) != probe:
        missed.append("the tokenizer loses text: decode(encode(probe)) differs from the probe")
    return measured, missed


# ------------------------------------------------------------------------------------------------ files

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The quickstart's base model

A Qwen2 of {num_parameters:,} parameters (2 layers, hidden size 128, vocabulary {vocab_size}), pre-trained from random
weights for {num_steps} steps of {batch_size} generated traces of two-digit arithmetic. Made by

    python tools/make_tiny_base.py --out conf/quickstart --seed {seed}

and measured by `python tools/make_tiny_base.py --check conf/quickstart`. No data or weights of anybody else went into
it. It is a stand-in for a base model in a test of the whole training loop, and good for nothing else.

The prompt is `Q: 37*45-12=?\\nA:`. Of the traces, {text:.0%} answer in text, nearly always wrong; {good:.0%} write a
right program and read its output right; {misread:.0%} write a right program and answer something else; {buggy:.0%} write
a program that fails and then a wrong answer. Tokenizer: byte-level BPE in Qwen2's format, digits one by one, trained on
the same traces.

On {num_problems} held-out problems (`arithmetic:{held_out_seed}`), one tool call allowed:

| decoding | quantity | this model | range of the recipe |
|---|---|---|---|
{rows}

The tool gives the same files again on the same machine (PyTorch on one CPU thread); on another, or with another seed,
it gives a model within the ranges.
"""


def card(model: Qwen2ForCausalLM, recipe: Recipe, seed: int, measured: dict[str, Quality]) -> str:
    rows = [
        f"| {decoding} | {quantity} | {asdict(measured[decoding])[quantity]:.3f} | {low:.2f} to {high:.2f} |"
        for decoding, ranges in RANGES.items()
        for quantity, (low, high) in ranges.items()
    ]
    mix = asdict(recipe.mix)
    return CARD.format(
        num_parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=VOCAB_SIZE,
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        seed=seed,
        text=1 - sum(mix.values()),
        **mix,
        num_problems=512,
        held_out_seed=HELD_OUT_SEED,
        rows="\n".join(rows),
    )


def write(out: Path, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, readme: str) -> None:
    """Writes the folder beside `out` and swaps it in; whatever else lay in `out` goes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fresh.chmod(0o755)
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(readme, encoding="utf-8")
        for file in fresh.iterdir():
            file.chmod(0o644)  # save_pretrained writes weights for the owner alone
        old = fresh.with_name(fresh.name + ".old")
        if out.exists():
            os.rename(out, old)
        os.rename(fresh, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def make(out: Path, recipe: Recipe, seed: int) -> list[str]:
    """Makes the model and writes it; returns what misses the card's ranges (then nothing is written)."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer(seed)
    torch.manual_seed(seed)
    model = make_model(tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, do_sample=True
    )
    train(model, tokenizer, recipe, seed)
    measured, missed = faults(model, tokenizer)
    if not missed:
        write(out, model, tokenizer, card(model, recipe, seed, measured))
    return missed


def check(folder: Path) -> list[str]:
    torch.set_num_threads(1)
    if not (folder / "config.json").is_file():
        return [f"{folder} holds no model; make one with `python tools/make_tiny_base.py --out {folder}`"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    measured, missed = faults(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer)
    for decoding, quality in measured.items():
        print(decoding, json.dumps(asdict(quality)))
    return missed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make or check the quickstart's tiny base model.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="make the model and put it there")
    action.add_argument("--check", type=Path, metavar="DIR", help="measure the model there against its card's ranges")
    parser.add_argument("--seed", type=int, default=0, help="of weights, traces and tokenizer corpus (default 0)")
    args = parser.parse_args(argv)
    missed = check(args.check) if args.check else make(args.out, Recipe(), args.seed)
    for line in missed:
        print(f"make_tiny_base: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
