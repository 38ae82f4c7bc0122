"""Weights, gradients and optimizer state of trainer ranks of any size, allocated by Megatron without their memory.

    bytes_worker.py RESULTS.jsonl CASES.json [TE_FOLDER]        megatron-core of PYTHONPATH

CASES: [[config file, [a.b=value, ...], world size], ...]. A line of RESULTS per case: for each part the bytes of the rank
that holds most ({"weights", "gradients", "optimizer"}) and the planner's figure. Every pipeline stage is built, rank 0 of
it: torch's fake tensors have shapes and storages of a size, and no memory behind them. TE's layers are built where
TE_FOLDER is given and weights are bf16, the local ones else.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import te_stub

if len(sys.argv) > 3:
    te_stub.install(Path(sys.argv[3]))

import fake_ranks

from torl_mega.config_file import load_config
from torl_mega.layout import ModelShape, describe_model
from torl_mega.planner import memory, steptime
from torl_mega.planner.hardware import Assumptions
from torl_mega.planner.known_models import hf_config
from torl_mega.trainer.cpu import backend as cpu_backend

PARTS = ("weights", "gradients", "optimizer")


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages behind these tensors, each counted once."""
    return sum({(s := t.untyped_storage())._cdata: s.nbytes() for t in tensors}.values())


def rank_bytes(config: Any, shape: ModelShape, kind: str) -> dict[str, int]:
    """What this rank holds once it is ready to train."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torl_mega.trainer.optimizer import build_optimizer, wrap_ddp

    with FakeTensorMode(allow_non_fake_inputs=True):
        chunks, built = fake_ranks.build(config, shape, kind)
        wrapped = wrap_ddp(chunks, built, config.trainer)
        optimizer, _ = build_optimizer(wrapped, built, config.optim, config.trainer, total_steps=10)
        buffers = [b for w in wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
        state: list[torch.Tensor] = []
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            inner = part.optimizer
            state += [p for group in inner.param_groups for p in group["params"]]
            state += [v for values in inner.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        weights = [p for chunk in chunks for p in chunk.parameters()]
        masters_are_weights = config.model.dtype == "float32"
        return {
            "weights": storage_bytes(weights),
            "gradients": storage_bytes(b.grad_data for b in buffers),
            "optimizer": storage_bytes(state) - (storage_bytes(weights) if masters_are_weights else 0),
        }


def case(conf: str, overrides: list[str], world_size: int, have_te: bool) -> dict[str, Any]:
    config = load_config(conf, overrides)
    kind = "te" if have_te and config.model.dtype == "bfloat16" else "local"
    shape = describe_model(hf_config(config.model.path))
    begun = time.monotonic()
    stages = []
    for stage in range(config.parallel.pipeline):
        with fake_ranks.rank_of(config, stage * (world_size // config.parallel.pipeline), world_size):
            stages.append(rank_bytes(config, shape, kind))
    assume = Assumptions()
    data = world_size // config.parallel.model_size
    tokens = steptime.workload(config, assume, None).mean_tokens
    plan = memory.trainer_memory(shape, config, data, tokens, assume, kind == "local")
    return {
        "conf": conf,
        "world_size": world_size,
        "built": {part: max(stage[part] for stage in stages) for part in PARTS},
        "planned": {part: getattr(plan, part) for part in PARTS},
        "seconds": round(time.monotonic() - begun, 1),
    }


def main(results: Path, cases: Path, have_te: bool) -> None:
    logging.disable(logging.WARNING)
    cpu_backend.install()
    import megatron.core.tensor_parallel.random as megatron_random

    tracker: Any = megatron_random.CudaRNGStatesTracker
    tracker.fork = lambda self, name="": nullcontext()  # it compares random states, which fake tensors do not have
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[assignment,method-assign]
    for conf, overrides, world_size in json.loads(cases.read_text()):
        line = case(conf, overrides, world_size, have_te)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3)
