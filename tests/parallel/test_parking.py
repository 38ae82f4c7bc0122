"""Weights, gradients and optimizer state leave the device between updates, and every update is bit for bit what it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from layout_cases import Layout
from torchrun import NEXT, run_python

CASES = [
    (Layout(), "float32"),  # whose fp32 weights are their own masters: views of Megatron's buffer
    (Layout(tensor=2, data=2, sequence=True, overlap=True), "bfloat16"),
]
MORE = [(Layout(), "bfloat16"), (Layout(data=2, distributed_optimizer=False), "bfloat16")]


def run(work: Path, planned: list[tuple[Layout, str]], *, next_megatron: bool) -> list[dict[str, Any]]:
    results, cases = work / "results.jsonl", work / "cases.json"
    cases.write_text(json.dumps([[asdict(layout), dtype] for layout, dtype in planned]))
    worker = Path(__file__).with_name("parking_worker.py")
    run_python(worker, results, work, cases, next_megatron=next_megatron, timeout_s=270)
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.parametrize(
    ("planned", "next_megatron"),
    [
        pytest.param(CASES, False, id="0.16"),
        pytest.param(MORE, False, marks=pytest.mark.slow, id="0.16-more"),
        pytest.param([*CASES, *MORE], True, marks=pytest.mark.slow, id="0.19"),
    ],
)
def test_what_is_parked_is_gone_and_comes_back_bit_for_bit(
    tmp_path: Path, planned: list[tuple[Layout, str]], next_megatron: bool
) -> None:
    if next_megatron and not NEXT.exists():
        pytest.skip("megatron-core 0.19.2 is not here: make mcore-next")
    table = run(tmp_path, planned, next_megatron=next_megatron)
    assert len(table) == sum(layout.world_size for layout, _ in planned)
    for row in table:
        assert row["parked"]["digests"] == row["plain"]["digests"], row
        assert len(set(row["plain"]["digests"])) == len(row["plain"]["digests"]), (
            "a step that moves nothing proves nothing"
        )
        sizes = row["parked"]["sizes"]
        assert sizes[""] < 0.03 * sizes["all"], sizes
        assert sizes[""] < sizes["weights"] < sizes["weights,optimizer"] or row["dtype"] == "float32", sizes
        assert sizes["weights,optimizer"] < 0.85 * sizes["all"], "gradients are still there"
