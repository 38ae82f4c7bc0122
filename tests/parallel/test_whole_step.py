"""From recorded trajectories to weights after three RL steps, against plain HF + torch: every recipe, one rank and several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from layout_cases import Layout
from step_reference import CASES
from torchrun import run_python

ONE = Layout()
SEVERAL = [
    Layout(tensor=2, sequence=True),
    Layout(data=2, overlap=True),
    Layout(pipeline=2),
    Layout(context=2),
    Layout(data=2, distributed_optimizer=False),
]
WEIGHTS, GRAD_NORM = 1e-5, 1e-4


def check(work: Path, plan: Sequence[tuple[Layout, Sequence[str]]], timeout_s: float) -> None:
    results, cases = work / "results.jsonl", work / "cases.json"
    cases.write_text(json.dumps([[asdict(layout), list(names)] for layout, names in plan]))
    run_python(Path(__file__).with_name("step_worker.py"), results, work, cases, timeout_s=timeout_s)
    table = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(table) == sum(len(names) for _, names in plan)
    wrong = [row for row in table if not (row["weights"] <= WEIGHTS and row["grad_norm"] <= GRAD_NORM)]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(row["moved"] > 100 * WEIGHTS for row in table), "a step that moves nothing proves nothing"


def test_every_recipe_on_one_rank_and_three_on_several(tmp_path: Path) -> None:
    chosen = ["two updates", "gspo", "cispo"]
    check(tmp_path, [(ONE, list(CASES)), (SEVERAL[0], chosen[:2]), (SEVERAL[3], chosen[1:])], 280.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_recipe_in_every_kind_of_layout(tmp_path: Path) -> None:
    check(tmp_path, [(layout, list(CASES)) for layout in SEVERAL], 1700.0)
