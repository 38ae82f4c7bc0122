"""Models with experts: what test_layouts.py and test_checkpoints.py prove of dense ones, by the same workers and limits.

By default a chosen few, on the newer megatron-core where `make mcore-next` has run; `-m slow` runs the whole matrix on both.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import hf_reference as ref
import pytest
import test_layouts as layouts
import torch
from layout_cases import MOE_DEFAULT, MOE_FAMILIES, Layout, moe_matrix
from safetensors.torch import load_file
from test_checkpoints import HERE, tool
from torchrun import NEXT, run_python

SAVED = Layout(tensor=2, sequence=True, data=2, expert=2, expert_tensor=2)
LOADED = Layout(data=2, expert=2)
MORE = [
    SAVED,
    LOADED,
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2, virtual_pipeline=2, data=2, expert=2),
    Layout(data=4, expert=4, overlap=True),
    Layout(tensor=2, context=2, sequence=True, expert=4),
    Layout(),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for family, tied in MOE_FAMILIES:
        ref.save_model(ref.make_model(family, tied=tied), folder / f"{family}_{'tied' if tied else 'untied'}")
    return folder


def plan_of(chosen: list[Layout]) -> list[tuple[Layout, list[tuple[str, bool]]]]:
    return [(layout, [MOE_FAMILIES[n % len(MOE_FAMILIES)]]) for n, layout in enumerate(chosen)]


def test_chosen_layouts(models: Path) -> None:
    table = layouts.run(models, plan_of(MOE_DEFAULT), next_megatron=NEXT.is_dir())
    layouts.check(table, len(MOE_DEFAULT))


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(
    "next_megatron", [False, pytest.param(True, marks=layouts.needs_next)], ids=["0.16.1", "0.19.2"]
)
def test_whole_matrix(models: Path, next_megatron: bool) -> None:
    plan = plan_of(moe_matrix())
    layouts.check(layouts.run(models, plan, next_megatron=next_megatron, timeout_s=5000), len(plan))


def resumed(
    models: Path, savers: list[Layout], loaders: list[Layout], family: str, next_megatron: bool, timeout_s: float
) -> None:
    results, cases = models / "pairs.jsonl", models / "pairs.json"
    results.unlink(missing_ok=True)
    cases.write_text(json.dumps([[asdict(x) for x in savers], [asdict(x) for x in loaders], [family, False]]))
    worker = HERE / "checkpoint_worker.py"
    run_python(worker, results, models, cases, next_megatron=next_megatron, timeout_s=timeout_s)
    table = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(table) == len(savers) * len(loaders)
    assert all(row["weights"] <= layouts.LIMITS["weights"] for row in table), table


def test_saved_in_one_layout_resumed_in_another(models: Path) -> None:
    resumed(models, [SAVED], [LOADED], "qwen2moe", NEXT.is_dir(), 280.0)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(
    "next_megatron", [False, pytest.param(True, marks=layouts.needs_next)], ids=["0.16.1", "0.19.2"]
)
@pytest.mark.parametrize("family", ["qwen3moe", "qwen2moe"])
def test_every_pair_of_layouts(models: Path, family: str, next_megatron: bool) -> None:
    resumed(models, MORE, MORE, family, next_megatron, 5000.0)


@pytest.mark.slow
def test_conversion_keeps_every_bit(models: Path) -> None:
    source, megatron, back = models / "qwen2moe_untied", models / "converted", models / "back"
    there = ["--hf", str(source), "--out", str(megatron), "--ep", "2"]
    assert (done := tool("convert_hf_to_megatron.py", *there)).returncode == 0, done.stderr[-2000:]
    and_back = ["--checkpoint", str(megatron), "--out", str(back)]
    assert (done := tool("convert_megatron_to_hf.py", *and_back)).returncode == 0, done.stderr[-2000:]
    wanted, found = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
