"""The planner's bytes against what the real Megatron allocates for a rank, for every shipped config and a 32B on 1,024 ranks.

The GPU image's megatron-core and Transformer Engine's layers where they are fetched, else the installed megatron-core's
local layers: the bytes are the same. Nothing here needs the memory that it counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parallel"))

from torchrun import NEXT, run_python  # noqa: E402

from torl_mega.config_file import load_config  # noqa: E402
from torl_mega.planner.placement import place  # noqa: E402

TE = ROOT / "build/te"  # made by `make gpu-sources`
SHIPPED = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("conf/*.yaml"), *ROOT.glob("conf/clusters/*.yaml"))
    if path.name != "base.yaml"
)
THOUSAND = ("conf/torl_32b.yaml", ("cluster.nodes=128", "trainer.mini_batch_samples=2048"))
DEEP = (
    "conf/torl_7b.yaml",
    ("cluster.nodes=8", "parallel.pipeline=4", "parallel.virtual_pipeline=7", "parallel.tensor=4"),
)
CASES = [*((conf, ()) for conf in SHIPPED), THOUSAND, DEEP]


def world_size(conf: str, overrides: tuple[str, ...]) -> int:
    config = load_config(ROOT / conf, overrides)
    if "quickstart" in conf:  # on cores: as many ranks as its cut has
        return config.parallel.world_size
    placement, problems = place(config, nodes=config.cluster.nodes, gpus=8, gpu="h100")
    assert placement is not None, problems
    return placement.world_size


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bytes")
    cases, results = folder / "cases.json", folder / "results.jsonl"
    cases.write_text(json.dumps([[conf, list(extra), world_size(conf, extra)] for conf, extra in CASES]))
    worker, fetched = Path(__file__).with_name("bytes_worker.py"), TE.is_dir() and NEXT.is_dir()
    run_python(worker, results, cases, *([TE] if fetched else []), next_megatron=fetched, timeout_s=280)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return {(row["conf"], row["world_size"]): row for row in rows}


def test_a_thousand_ranks_are_a_thousand_ranks() -> None:
    assert world_size(*THOUSAND) == 1024


@pytest.mark.parametrize(("conf", "overrides"), CASES)
def test_the_plan_is_what_megatron_allocates(
    table: dict[tuple[str, int], dict[str, Any]], conf: str, overrides: tuple[str, ...]
) -> None:
    row = table[conf, world_size(conf, overrides)]
    assert row["built"] == pytest.approx(row["planned"], rel=1e-5), row
