"""The two ends of pre-training the base of the paper in small: where it starts, and what is shipped of it.

    python tools/make_paper_base.py start build/paper_small/start      tokenizer and random weights, seeded
    torl pretrain conf/paper_small/base.yaml                           (with tools/ on PYTHONPATH)
    python tools/make_paper_base.py ship runs/paper_small_base/hf build/paper_small/model       weights in bfloat16, and a card

`make paper-base` does all three. Contract: the same seed gives the same start everywhere; the weights after pre-training are
the same on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import make_tiny_base as tiny
import torch
from paper_traces import MIX, rows
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from torl_mega.config_file import load_config
from torl_mega.run.files import replace_folder, temporary_for

VOCAB_SIZE = 512
SEED = 7
SIZES: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5}
HEADS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2}

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The base model of the paper in small

A Qwen2 of {num:,} parameters ({layers} layers, hidden size {hidden}, vocabulary {vocab}), pre-trained from random weights for
{steps} steps of {rows} generated answers to word problems (`torl_mega/data/word_problems.py`). Made by

    make paper-base

No data or weights of anybody else went into it; it stands for a base model and is good for nothing else.

The rates of the answers (`tools/paper_traces.py`):

| rate | value |
|---|---|
{rates}
"""


def start(out: Path) -> None:
    corpus = [row["prompt"] + "".join(text for text, _ in row["pieces"]) for row in islice(rows(SEED + 1), 4000)]
    tokenizer = tiny.qwen2_tokenizer(corpus, VOCAB_SIZE - len(tiny.SPECIAL_TOKENS))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tiny.SPECIAL_TOKENS[1:])})
    eos = tokenizer.eos_token_id
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE, **SIZES, **HEADS, max_position_embeddings=2048, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None, eos_token_id=eos, pad_token_id=eos,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos, do_sample=True)
    _write(out, model, tokenizer.save_pretrained)


def ship(source: Path, out: Path, conf: Path) -> None:
    config = load_config(conf)
    assert config.pretrain is not None
    model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    card = CARD.format(
        num=sum(p.numel() for p in model.parameters()), layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size, vocab=model.config.vocab_size, steps=config.num_steps,
        rows=config.pretrain.rows_per_step, rates="\n".join(f"| {k} | {v} |" for k, v in asdict(MIX).items()),
    )  # fmt: skip

    def rest(fresh: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(source / name, fresh / name)
        (fresh / "README.md").write_text(card)

    _write(out, model, rest)


def _write(out: Path, model: Any, rest: Any) -> None:
    """The folder beside `out`, swapped in."""
    fresh = temporary_for(out)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save_pretrained(fresh)
    rest(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
    replace_folder(fresh, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("start").add_argument("out", type=Path)
    shipping = verbs.add_parser("ship")
    shipping.add_argument("source", type=Path)
    shipping.add_argument("out", type=Path)
    shipping.add_argument("--conf", type=Path, default=Path("conf/paper_small/base.yaml"))
    args = parser.parse_args()
    if args.verb == "start":
        start(args.out)
    else:
        ship(args.source, args.out, args.conf)
    return 0


if __name__ == "__main__":
    sys.exit(main())
