"""What SGLang itself makes of our command lines and environments.

    sglang_reads.py QUESTIONS.json     {"commands": [[word, ...], ...], "environments": [{name: value}, ...], "model": folder,
                                        "ropes": [folder, ...]}

Prints {"commands": [{argument: value}, ...], "environments": [{name: value}, ...], "ropes": [table, ...]}: what its parser
reads in each command, NCCL's settings and compile caches in a server that is started with each environment, and the cosines
and sines [position, head size] that it computes for each model.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from sglang.srt import environ
from sglang.srt.entrypoints.engine import _set_envs_and_config
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.hf_transformers_utils import get_rope_config

POSITIONS = 16


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)  # a flag that is an abbreviation of another is a mistake
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(words)


def settled(environment: dict[str, str], model: str) -> dict[str, str]:
    """The environment of a server's processes, as SGLang completes ours before it starts them."""
    os.environ.clear()
    os.environ.update(environment)
    _set_envs_and_config(ServerArgs.from_cli_args(parse(["--model-path", model, "--device", "cpu"])))
    return {k: v for k, v in os.environ.items() if k.startswith("NCCL_")} | environ.third_party_cache_defaults()


def rotary(model: str) -> list[list[float]]:
    """As models/qwen2.py of SGLang asks for it."""
    config = transformers.AutoConfig.from_pretrained(model)
    theta, scaling = get_rope_config(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = get_rope(
        size, rotary_dim=size, max_position=config.max_position_embeddings, base=theta, rope_scaling=scaling,
        dtype=torch.float32,
    )  # fmt: skip
    return rope.cos_sin_cache[:POSITIONS].tolist()


def main(questions: Path) -> None:
    logging.disable(logging.ERROR)
    asked: dict[str, Any] = json.loads(questions.read_text())
    plain = (bool, int, float, str, type(None))
    commands = [{k: v for k, v in vars(parse(words)).items() if isinstance(v, plain)} for words in asked["commands"]]
    environments = [settled(environment, asked["model"]) for environment in asked["environments"]]
    ropes = [rotary(model) for model in asked["ropes"]]
    print("\n" + json.dumps({"commands": commands, "environments": environments, "ropes": ropes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
