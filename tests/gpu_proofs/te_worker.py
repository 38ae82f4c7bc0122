"""Builds Transformer Engine's layers in every layout, one rank after the other, beside the local ones.

    te_worker.py RESULTS.jsonl TE_FOLDER MODELS_FOLDER        megatron-core of PYTHONPATH

RESULTS gets a line {"model", "layout", "ranks", "keys", "problems"} per model and layout, then {"recipe", "layout",
"found", "problems"} per precision profile. `problems` says in words what differs from the local layers, whose numbers the
layout tests compare with HF.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "parallel")]

import te_stub  # noqa: E402

te_stub.install(Path(sys.argv[2]))

import fake_ranks  # noqa: E402
from layout_cases import Layout  # noqa: E402
from layout_worker import config_for  # noqa: E402

from torl_mega.errors import ConfigError  # noqa: E402
from torl_mega.layout import describe_model, read_hf_config  # noqa: E402
from torl_mega.trainer.cpu import backend as cpu_backend  # noqa: E402
from torl_mega.trainer.precision import PROFILES, Machine, check_precision  # noqa: E402
from torl_mega.trainer.weights.hf_io import HfReader  # noqa: E402

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=4, pipeline=2, sequence=True),
    Layout(context=2),
    Layout(tensor=2, context=2, pipeline=2, data=2, sequence=True),
]
MOE_LAYOUTS = [
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(data=2, expert=2),
    Layout(tensor=2, sequence=True, expert_tensor=2),
    Layout(tensor=2, data=2, sequence=True, expert=2, expert_tensor=2),
    Layout(pipeline=2, virtual_pipeline=2, data=2, expert=2),
]
RECIPE_LAYOUTS = [Layout(tensor=2, sequence=True), Layout(pipeline=2, virtual_pipeline=2), Layout(context=2)]


def attributes(parameter: Any, *, grouped: bool) -> dict[str, Any]:
    """What the gradient all-reduces and the norm read of a parameter; of which axis is cut nothing reads in grouped experts."""
    names = ("sequence_parallel", "tensor_model_parallel", *(() if grouped else ("partition_dim", "partition_stride")))
    found = {name: getattr(parameter, name, None) or None for name in names}
    return found | {"allreduce": getattr(parameter, "allreduce", True)}


def checkpoint_keys(chunks: list[Any]) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """(chunk, key, offset) -> global shape of everything with a shape in the sharded state dict."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = {}
    for n, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": group, "singleton_local_shards": False})
        for key, value in state.items():
            if hasattr(value, "global_shape") and "_extra_state" not in key:
                found[n, value.key, tuple(value.global_offset)] = tuple(value.global_shape)
    return found


def differences(te: list[Any], local: list[Any], model: Path, shape: Any, single: bool) -> Iterator[str]:
    """Everything about TE's chunks that is not as in the local ones of the same rank."""
    from torl_mega.trainer.weights.reshard import WeightMap

    reader = HfReader(model, shape)
    maps = [WeightMap(te, shape), WeightMap(local, shape)]
    if not maps[0].te or maps[1].te:
        yield "the names of Transformer Engine's layers are not recognised"
    for weight_map in maps:
        weight_map.load(reader)  # asserts that every parameter has a rule and that shapes agree
    for (rule, prefix, _, mine), (_, _, _, theirs) in zip(maps[0].entries(), maps[1].entries(), strict=True):
        name = prefix + rule.megatron
        if mine is None or theirs is None:
            if mine is not theirs:
                yield f"{name} is on one side only"
            continue
        if not torch.equal(mine, theirs):
            yield f"{name} holds other numbers"
        marks = [attributes(parameter, grouped=rule.expert is not None) for parameter in (mine, theirs)]
        if marks[0] != marks[1]:
            yield f"{name} is marked {marks[0]}, locally {marks[1]}"
    ours, wanted = checkpoint_keys(te), checkpoint_keys(local)
    for key in sorted({key for key in ours.keys() | wanted.keys() if ours.get(key) != wanted.get(key)}):
        yield f"checkpoint key {key}: global shape {ours.get(key)}, locally {wanted.get(key)}"
    if single:  # the only rank there is: what it would send is the HF folder
        for name, tensor in maps[0].gather():
            if not torch.equal(tensor, reader.get(name)):
                yield f"{name} comes back with other numbers"


def compare(model: Path, layout: Layout) -> dict[str, Any]:
    shape = describe_model(read_hf_config(model))
    problems: list[str] = []
    keys = 0
    for rank in range(layout.world_size):
        config = config_for(layout, model, ("model.dtype=bfloat16",))
        with fake_ranks.rank_of(config, rank, layout.world_size):
            te, _ = fake_ranks.build(config, shape, "te")
            local, _ = fake_ranks.build(config, shape, "local")
            found = differences(te, local, model, shape, layout.world_size == 1)
            problems += [f"rank {rank}: {text}" for text in found]
            keys += len(checkpoint_keys(te))
    line = {"model": model.name, "layout": layout.name, "ranks": layout.world_size, "keys": keys}
    return {**line, "problems": problems[:8]}


def recipe(profile: str, layout: Layout, model: Path) -> dict[str, Any]:
    """What Megatron makes of a precision profile, and which chips TE runs it on."""
    from megatron.core import fp8_utils
    from transformer_engine.pytorch import quantization  # pyright: ignore[reportMissingImports]

    te_stub.pretend(PROFILES[profile].min_capability if profile in PROFILES else (9, 0))
    shape = describe_model(read_hf_config(model))
    config = config_for(layout, model, ("model.dtype=bfloat16", f"trainer.precision={profile}"))
    with fake_ranks.rank_of(config, 0, layout.world_size):
        chunks, built = fake_ranks.build(config, shape, "te")
        chosen = fp8_utils.get_fp8_recipe(built) if built.fp8 else None
        with fp8_utils.get_fp8_context(built):
            active = quantization.FP8GlobalStateManager.is_fp8_enabled()
    found = {
        "recipe": type(chosen).__name__ if chosen else None,
        "format": chosen.fp8_format.name if chosen else None,
        "active": active,
        "rope_fusion": built.apply_rope_fusion,
    }
    problems = [f"{n} is not bf16" for c in chunks for n, p in c.named_parameters() if p.dtype is not torch.bfloat16]
    problems += _refused(profile, chosen)
    return {"recipe": profile, "layout": layout.name, "found": found, "problems": problems}


def _refused(profile: str, chosen: Any) -> Iterator[str]:
    """Chips and CUDA versions that our table lets through and Transformer Engine does not."""
    from transformer_engine.pytorch import quantization  # pyright: ignore[reportMissingImports]

    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for cuda in ((12, 0), (12, 8), (12, 9), (13, 3)):
            try:
                check_precision(profile, Machine(capability, (2, 17), cuda))
            except ConfigError:
                continue
            te_stub.pretend(capability, ".".join(map(str, cuda)))
            try:
                if chosen is not None:
                    quantization.check_recipe_support(chosen)
            except RuntimeError as exc:
                yield f"compute capability {capability}, CUDA {cuda}: {exc}"


def main(results: Path, models: Path) -> None:
    logging.disable(logging.WARNING)
    cpu_backend.install()
    import megatron.core
    import transformer_engine  # pyright: ignore[reportMissingImports] - unpacked for this test

    def write(line: dict[str, Any]) -> None:
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    write({"versions": [str(megatron.core.__version__), transformer_engine.__version__], "problems": []})
    linear = inspect.signature(transformer_engine.pytorch.Linear.__init__)
    write({"linear": list(linear.parameters), "problems": []})
    folders = sorted(folder for folder in models.iterdir() if folder.is_dir())
    for model in folders:
        for layout in MOE_LAYOUTS if "moe" in model.name else LAYOUTS:
            write(compare(model, layout))
    for profile in ("default", *PROFILES):
        for layout in RECIPE_LAYOUTS:
            write(recipe(profile, layout, folders[0]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]))
