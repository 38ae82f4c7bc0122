"""Makes the quickstart's base model: a 0.4M-parameter Qwen2 that has seen arithmetic answered in text and in Python.

    python tools/make_tiny_base.py --out conf/quickstart            make it (minutes, one core)
    python tools/make_tiny_base.py --out conf/quickstart_moe --experts 8      a Qwen3-MoE, its weights in bfloat16
    python tools/make_tiny_base.py --check conf/quickstart          measure it against its card's ranges

What it learns to be is what a base model is to ToRL: it knows the form of a tool call, does not favour it, often gets
it wrong, and cannot do the arithmetic without it. Traces are encoded in the very pieces in which a rollout encodes them
(prompt, sampled text up to ```output, observation, the rest), so a rollout meets no token sequence it has not seen.

Contract: same seed and same machine give the same bytes (one thread, fixed data); elsewhere the last bits may differ
and the card's ranges hold. The folder is written beside its final place and swapped in; a killed run leaves the old.
Limits: `--check` uses an interpreter of sums and products for the model's programs, not the sandbox.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tiny_base_quality import NUM_MEASURED, RANGES, Quality, faults
from tiny_base_traces import HELD_OUT_SEED, TEMPLATE, Mix, Piece, trace, training_problems
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from torl_mega.run.files import replace_folder, temporary_for
from torl_mega.types import Problem

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # Qwen2's own, after all other ids as in Qwen2
VOCAB_SIZE = 320  # 256 bytes, 61 merges, 3 special tokens; divisible by every tensor-parallel size of the tests


def qwen2_tokenizer(corpus: list[str], num_texts: int) -> Any:
    """Byte-level BPE of `num_texts` tokens, with SPECIAL_TOKENS behind them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=num_texts, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    merges: Any = [tuple(pair) for pair in model["merges"]]  # the annotation there says str, the code wants pairs
    return Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=4096)


def make_tokenizer(seed: int) -> Any:
    """Byte-level BPE in Qwen2's own format: AutoTokenizer rebuilds exactly this one from `model_type: qwen2`."""
    rng, source = random.Random(seed), training_problems(seed)
    corpus = [
        TEMPLATE.format(problem=p.problem) + "".join(t for t, _ in trace(p, rng, Mix())) for p in islice(source, 400)
    ]
    tokenizer = qwen2_tokenizer(corpus, VOCAB_SIZE - len(SPECIAL_TOKENS))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


@dataclass(frozen=True)
class Recipe:
    num_steps: int = 800
    batch_size: int = 64
    lr: float = 2e-3
    mix: Mix = field(default_factory=Mix)


def make_model(eos: int, vocab_size: int = VOCAB_SIZE) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def make_moe(eos: int, experts: int) -> Qwen3MoeForCausalLM:
    """The same with `experts` experts in each layer, of which a token takes two, as wide together as the dense MLP."""
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "moe_intermediate_size": 160,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "experts_implementation": "eager",
    }
    ends = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCAB_SIZE, **sizes, **ends))


def encode_trace(tokenizer: Any, problem: Problem, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Token ids [T] and labels [T] (-100 where the policy does not write), the closing EOS included."""
    ids = tokenizer.encode(TEMPLATE.format(problem=problem.problem))
    labels = [-100] * len(ids)
    for text, written in pieces:
        piece = tokenizer.encode(text)
        ids += piece
        labels += piece if written else [-100] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], labels [B, T]) of ragged rows, padded on the right; causal attention never looks at the padding."""
    length = max(len(ids) for ids, _ in rows)
    ids, labels = torch.full((len(rows), length), pad), torch.full((len(rows), length), -100)
    for row, (i, y) in enumerate(rows):
        ids[row, : len(i)], labels[row, : len(y)] = torch.tensor(i), torch.tensor(y)
    return ids, labels


def batches(tokenizer: Any, recipe: Recipe, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids [B, T], labels [B, T])."""
    rng, source = random.Random(seed), training_problems(seed)
    while True:
        rows = [encode_trace(tokenizer, p, trace(p, rng, recipe.mix)) for p in islice(source, recipe.batch_size)]
        yield padded(rows, tokenizer.eos_token_id)


def train(model: Any, tokenizer: Any, recipe: Recipe, seed: int) -> None:
    data = islice(batches(tokenizer, recipe, seed), recipe.num_steps)
    fit(model, data, num_steps=recipe.num_steps, lr=recipe.lr)


def fit(model: Any, data: Iterator[tuple[torch.Tensor, torch.Tensor]], *, num_steps: int, lr: float) -> None:
    """AdamW over (ids [B, T], labels [B, T]), one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.05)
    start = time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(data, start=1):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}/{num_steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)
    model.eval()


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The quickstart's base model

A {kind} of {num_parameters:,} parameters (2 layers, hidden size 128, vocabulary {vocab_size}), pre-trained from random
weights for {num_steps} steps of {batch_size} generated traces of two-digit arithmetic. Made by

    python tools/make_tiny_base.py --out conf/{folder} --seed {seed}{options}

and measured by `python tools/make_tiny_base.py --check conf/{folder}`. No data or weights of anybody else went into
it. It is a stand-in for a base model in a test of the whole training loop, and good for nothing else.

The prompt is `Q: 37*45-12=?\\nA:`. Of the traces, {text:.0%} answer in text, nearly always wrong; {good:.0%} write a
right program and read its output right; {misread:.0%} write a right program and answer something else; {buggy:.0%}
write a program that fails and then a wrong answer. Tokenizer: byte-level BPE in Qwen2's format, digits one by one,
trained on the same traces.

On {num_problems} held-out problems (`arithmetic:{held_out_seed}`), one tool call allowed:

| decoding | quantity | this model | range of the recipe |
|---|---|---|---|
{rows}

The tool gives the same files again on the same machine (PyTorch on one CPU thread); on another, or with another seed,
it gives a model within the ranges.
"""


def card(model: Any, recipe: Recipe, seed: int, measured: dict[str, Quality]) -> str:
    rows = [
        f"| {decoding} | {quantity} | {asdict(measured[decoding])[quantity]:.3f} | {low:.2f} to {high:.2f} |"
        for decoding, ranges in RANGES.items()
        for quantity, (low, high) in ranges.items()
    ]
    mix = asdict(recipe.mix)
    experts = getattr(model.config, "num_experts", 0)
    return CARD.format(
        kind=f"Qwen3-MoE with {experts} experts a layer, two for each token, its weights in bfloat16,"
        if experts
        else "Qwen2",
        folder="quickstart_moe" if experts else "quickstart",
        options=f" --experts {experts}" if experts else "",
        num_parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=VOCAB_SIZE,
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        seed=seed,
        text=1 - sum(mix.values()),
        **mix,
        num_problems=NUM_MEASURED,
        held_out_seed=HELD_OUT_SEED,
        rows="\n".join(rows),
    )


def write(out: Path, model: Any, tokenizer: Any, readme: str) -> None:
    """Writes the folder beside `out` and swaps it in; whatever else lay in `out` goes."""
    fresh = temporary_for(out)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(readme, encoding="utf-8")
        for file in fresh.iterdir():
            file.chmod(0o644)  # save_pretrained writes weights for the owner alone
        replace_folder(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def make(out: Path, recipe: Recipe, seed: int, experts: int) -> list[str]:
    """Makes the model and writes it; returns what misses the card's ranges (then nothing is written). `experts`: 0 = dense."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer(seed)
    torch.manual_seed(seed)
    model: Any = make_moe(tokenizer.eos_token_id, experts) if experts else make_model(tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, do_sample=True
    )
    model.config.output_router_logits = bool(experts)  # its loss then holds the balance loss
    train(model, tokenizer, recipe, seed)
    model.config.output_router_logits = False
    if experts:
        model = model.to(torch.bfloat16).float()  # what is shipped is what is measured
    measured, missed = faults(model, tokenizer)
    if not missed:
        write(out, model.to(torch.bfloat16) if experts else model, tokenizer, card(model, recipe, seed, measured))
    return missed


def check(folder: Path) -> list[str]:
    torch.set_num_threads(1)
    if not (folder / "config.json").is_file():
        return [f"{folder} holds no model; make one with `python tools/make_tiny_base.py --out {folder}`"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    measured, missed = faults(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)
    for decoding, quality in measured.items():
        print(decoding, json.dumps(asdict(quality)))
    return missed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make or check the quickstart's tiny base model.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="make the model and put it there")
    action.add_argument("--check", type=Path, metavar="DIR", help="measure the model there against its card's ranges")
    parser.add_argument(
        "--experts", type=int, default=0, metavar="N", help="experts in each layer (default 0: a dense model)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, traces and tokenizer corpus (default 0)")
    args = parser.parse_args(argv)
    missed = check(args.check) if args.check else make(args.out, Recipe(), args.seed, args.experts)
    for line in missed:
        print(f"make_tiny_base: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
