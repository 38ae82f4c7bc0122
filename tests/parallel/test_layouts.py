"""Every layout computes what HF + torch compute: logits, gradients, weights after three clipped AdamW steps, all in fp32.

One start runs all layouts and models, their ranks forked from one process. By default a chosen few on the installed
megatron-core (and on the other one where `make mcore-next` has run); `-m slow` runs the whole matrix on both.
With TORL_LAYOUTS_OUT=DIR the table of each run is kept there, for `make_layouts_doc.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import hf_reference as ref
import pytest
from layout_cases import DEFAULT, FAMILIES, Layout, matrix
from torchrun import NEXT, run_python

LIMITS = {
    "logits": 2e-6,
    "grad": 2e-7,
    "weights": 5e-7,
    "logprobs": 2e-6,
    "entropy": 4e-6,
    "loss": 1e-6,
    "grad_norm": 1e-5,
    "routes": 0,  # experts that the old-log-prob pass took and HF did not
}
WORKER = Path(__file__).with_name("layout_worker.py")

needs_next = pytest.mark.skipif(not NEXT.is_dir(), reason="run `make mcore-next` to test megatron-core 0.19.2 too")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family, tied in FAMILIES:
        ref.save_model(ref.make_model(family, tied=tied), folder / f"{family}_{'tied' if tied else 'untied'}")
    return folder


def run(
    models: Path,
    plan: Sequence[tuple[Layout, Sequence[tuple[str, bool]]]],
    *,
    next_megatron: bool,
    timeout_s: float = 240.0,
) -> list[dict]:
    """The table of results."""
    name = f"results_{'next' if next_megatron else 'now'}_{len(plan)}.jsonl"
    results, cases = models / name, models / "cases.json"
    results.unlink(missing_ok=True)
    cases.write_text(json.dumps([[asdict(layout), list(families)] for layout, families in plan]))
    run_python(WORKER, results, models, cases, next_megatron=next_megatron, timeout_s=timeout_s)
    if "TORL_LAYOUTS_OUT" in os.environ:
        shutil.copy(results, Path(os.environ["TORL_LAYOUTS_OUT"]) / name)
    return [json.loads(line) for line in results.read_text().splitlines()]


def check(table: list[dict], expected: int) -> None:
    assert len(table) == expected
    wrong = [
        f"{row['layout']} {row['model']} tied={row['tied']}: {name} {row[name]:.2e} > {limit:.0e}"
        for row in table
        for name, limit in LIMITS.items()
        if not row[name] <= limit
    ]
    assert not wrong, "\n".join(wrong)


def rotate(
    layouts: Sequence[Layout], per_layout: Callable[[Layout], int]
) -> list[tuple[Layout, list[tuple[str, bool]]]]:
    """Give each layout so many of the six models, in turn."""
    plan, next_one = [], 0
    for layout in layouts:
        count = per_layout(layout)
        plan.append((layout, [FAMILIES[(next_one + k) % len(FAMILIES)] for k in range(count)]))
        next_one += count
    return plan


def whole_plan() -> list[tuple[Layout, list[tuple[str, bool]]]]:
    """All six models on layouts of up to four ranks, two in turn on those of eight."""
    return rotate(matrix(), lambda layout: len(FAMILIES) if layout.world_size <= 4 else 2)


# the version that every run on a CPU uses tells less here than the GPU's
INSTALLED = pytest.param(False, marks=[pytest.mark.slow] if NEXT.is_dir() else [])


@pytest.mark.parametrize("next_megatron", [INSTALLED, pytest.param(True, marks=needs_next)], ids=["0.16.1", "0.19.2"])
def test_chosen_layouts(models: Path, next_megatron: bool) -> None:
    plan = rotate(DEFAULT, lambda _: 1)
    check(run(models, plan, next_megatron=next_megatron), len(plan))


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("next_megatron", [False, pytest.param(True, marks=needs_next)], ids=["0.16.1", "0.19.2"])
def test_whole_matrix(models: Path, next_megatron: bool) -> None:
    plan = whole_plan()
    check(run(models, plan, next_megatron=next_megatron, timeout_s=3600), sum(len(f) for _, f in plan))
