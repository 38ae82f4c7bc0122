"""What SGLang itself makes of our command lines and environments.

    sglang_reads.py QUESTIONS.json     {"commands": [[word, ...], ...], "environments": [{name: value}, ...], "model": folder,
                                        "ropes": [folder, ...], "gpus": [[MiB, [word, ...]], ...]}

Prints {"commands": [{argument: value}, ...], "environments": [{name: value}, ...], "ropes": [table, ...], "fractions": [...]}:
what its parser reads in each command, NCCL's settings and compile caches in a server that is started with each environment, the
cosines and sines [position, head size] that it computes for each model, and the mem-fraction-static that it chooses by itself
for a command on a GPU of that memory.
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
from sglang.srt.arg_groups import memory_hook, pipeline
from sglang.srt.arg_groups.overrides import resolving_view
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
    environ.redirect_third_party_caches()
    caches = environ.third_party_cache_defaults()
    return {k: v for k, v in os.environ.items() if k.startswith("NCCL_") or k in caches}


class Enough(Exception):
    """The resolution has come to what was asked."""


def chosen_fraction(memory_mb: float, words: list[str], model: str) -> float:
    """SGLang's own settings up to those that depend on the GPU's memory."""
    run_hook = pipeline.run_hook

    def until(hook: Any, arguments: Any) -> None:
        run_hook(hook, arguments)
        if hook is memory_hook.handle_gpu_memory_settings:
            raise Enough

    pipeline.run_hook = until
    memory_hook.get_device_memory_capacity = lambda _device=None: memory_mb
    arguments = ServerArgs.from_cli_args(parse(["--model-path", model, "--device", "cuda", *words]))
    try:
        pipeline.run_resolution_pipeline(arguments)
    except Enough:
        return resolving_view(arguments).mem_fraction_static
    finally:
        pipeline.run_hook = run_hook
    raise AssertionError("SGLang never looked at the GPU's memory")


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
    fractions = [chosen_fraction(memory_mb, words, asked["model"]) for memory_mb, words in asked["gpus"]]
    answers = {"commands": commands, "environments": environments, "ropes": ropes, "fractions": fractions}
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
