"""Saves that scale: each rank's cost, full disks, and checkpoints whose optimizer state Megatron gathered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_reference as ref
import pytest
import torch
from torchrun import NEXT, run_python

WORKER = Path(__file__).with_name("save_worker.py")
needs_next = pytest.mark.skipif(not NEXT.is_dir(), reason="run `make mcore-next` to test megatron-core 0.19.2 too")


INSTALLED = pytest.param(False, marks=[pytest.mark.slow] if NEXT.is_dir() else [])  # the GPU's version tells more


@pytest.fixture(scope="module", params=[INSTALLED, pytest.param(True, marks=needs_next)], ids=["installed", "next"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saves")
    ref.save_model(ref.make_model("qwen2", tied=True), folder / "small")
    large = ref.make_model("llama", tied=False, layers=6, hidden_size=512, intermediate_size=1024)
    ref.save_model(large.to(torch.bfloat16), folder / "large")
    arguments = [folder / "results.json", folder / "work", folder / "small", folder / "large"]
    run_python(WORKER, *arguments, next_megatron=request.param, timeout_s=280.0)
    return json.loads((folder / "results.json").read_text())


def test_each_rank_writes_its_share_and_needs_no_more_memory_than_its_state(found: dict[str, Any]) -> None:
    ranks = found["cost"]
    assert len(ranks) == 4
    assert all(rank["own"] > 60e6 for rank in ranks), ranks  # so that what an interpreter takes does not count
    assert all(rank["save"] <= 1.3 * rank["own"] for rank in ranks), ranks
    assert all(rank["load"] <= 1.3 * rank["own"] for rank in ranks), ranks
    written = [rank["written"] for rank in ranks]
    assert max(written) <= 1.1 * min(written), ranks
    assert sum(written) == pytest.approx(sum(rank["planned"] for rank in ranks), rel=0.02), ranks


def test_a_state_that_megatron_gathered_loads_bit_for_bit(found: dict[str, Any]) -> None:
    for rank in found["gathered"]:
        assert rank["equal"], rank
        assert rank["moved"], rank
        assert rank["pieces"] < rank["whole"] + 4, rank  # a rank saves its part, not everything


def test_a_full_disk_is_one_line_on_every_rank_and_leaves_nothing(found: dict[str, Any]) -> None:
    cases = {name: ranks for name, ranks in found.items() if name.startswith("full disk")}
    assert len(cases) == 4
    for name, ranks in cases.items():
        assert len(ranks) == 2
        for rank in ranks:
            assert "step_000001: cannot be written" in rank["said"], (name, rank)
            assert "free space or choose another runs_dir" in rank["said"], (name, rank)
            assert "\n" not in rank["said"], (name, rank)
            assert rank["left"] == [], (name, rank)
            assert rank["later"] == {"steps_done": 2}, (name, rank)
        assert ranks[0]["said"] == ranks[1]["said"], name
