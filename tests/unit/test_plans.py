"""Which model fits which hardware, ranks and servers in turns or apart, and the KV cache that a server then really has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError
from torl_mega.launch.check_commands import everything_started, faults
from torl_mega.planner.analyse import Analysis, Hardware, analyse
from torl_mega.planner.hardware import GIB, Assumptions
from torl_mega.planner.memory import ServerMemory
from torl_mega.planner.placement import takes_turns

ROOT = Path(__file__).resolve().parents[2]
HALVES = ["cluster.placement=disaggregated", "cluster.server_gpus_per_node=4", "serving.mem_fraction=0.7"]
NODES = ["cluster.placement=disaggregated", "cluster.server_nodes=1", "serving.mem_fraction=0.7"]
FITTING = [
    ("1.5b", 1, []), ("7b", 1, []), ("7b", 2, []), ("32b", 4, []),
    ("1.5b", 1, HALVES), ("7b", 1, HALVES), ("7b", 2, HALVES), ("7b", 2, NODES), ("32b", 4, NODES),
    ("7b", 1, ["trainer.park_weights=true", "serving.mem_fraction=0.6"]),
]  # fmt: skip
SPARE = 0.05


def plan(model: str, nodes: int, overrides: list[str]) -> Analysis:
    return analyse(load_config(f"conf/torl_{model}.yaml", overrides), Hardware(nodes, 8, "h100"), Assumptions())


@pytest.mark.parametrize(("model", "nodes", "overrides"), FITTING, ids=lambda value: str(value)[:50])
def test_it_fits_with_room_to_spare_and_its_commands_can_work(model: str, nodes: int, overrides: list[str]) -> None:
    found, config = plan(model, nodes, overrides), load_config(f"conf/torl_{model}.yaml", overrides)
    assert found.problems == ()
    assert found.placement is not None
    assert found.server is not None
    for phase in found.phases:
        assert phase.spare > SPARE * phase.available or phase.where == "host", phase
    started = everything_started(found.placement, config, Path("conf"))
    assert faults(found.placement, config, started) == []
    turns = takes_turns(config, found.placement)
    assert turns == ("cluster.placement=disaggregated" not in overrides)
    for each in started:
        words = each.command
        if each.process.role == "server":
            assert words[words.index("--kv-tokens") + 1] == str(int(found.server.kv_tokens))
            assert words[words.index("--mem-fraction") + 1] == str(found.server.mem_fraction)
            assert ("--in-turns" in words) == turns
        elif each.process.role == "rank":
            assert each.environment["TORL_TURNS"] == ("1" if turns else "")


def test_both_resident_does_not_fit_where_turns_do() -> None:
    """So the plan really counts what a turn takes off the GPU."""
    assert not plan("7b", 1, ["cluster.turns=never"]).fits
    in_turns = {(p.phase, p.where): p.parts for p in plan("7b", 1, []).phases}
    assert "gradients" not in in_turns["rollout", "shared"]
    assert "KV cache" not in in_turns["training", "shared"]
    parked = {(p.phase, p.where): p.parts for p in plan("7b", 1, ["trainer.park_weights=true"]).phases}
    assert "weights" not in parked["rollout", "shared"]
    assert parked["rollout", "host"]["weights"] == in_turns["training", "shared"]["weights"]


@given(
    weights=st.floats(1, 60), pool=st.floats(0.5, 60), reserve=st.floats(4, 20), extra=st.floats(0, 60), later=st.booleans(),
)  # fmt: skip
def test_case_9_the_kv_cache_is_the_plans_wherever_the_plans_bytes_are_free(
    weights: float, pool: float, reserve: float, extra: float, later: bool
) -> None:
    """SGLang's own rule (kv_cache_configurator.py:2990 and 3096 of 0.5.23) on a GPU with what the plan books free, and `extra`
    more; at a restart part of that is the trainer's."""
    server = ServerMemory(weights * GIB, pool * GIB, pool * GIB / 1024, 0.0, 0.0, reserve * GIB)
    free = weights + pool + reserve + (extra / 3 if later else extra)
    profiled = (free - weights) - free * (1 - server.mem_fraction)
    assert profiled >= pool - 1e-9
    assert min(profiled * GIB / 1024, int(server.kv_tokens)) == int(server.kv_tokens)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.turns=always", "rollout.max_staleness=1"], "cluster.turns = always needs rollout.max_staleness = 0, found 1"),
        (["cluster.turns=always", *NODES], "cluster.turns = always needs cluster.placement = colocated"),
        (["cluster.turns=always", "serving.urls=[http://a:1]"], "needs servers that the run itself starts"),
        (["trainer.park_weights=true", "cluster.turns=never"], "trainer.park_weights needs ranks and servers that take turns"),
        (["trainer.park_weights=true", *NODES], "trainer.park_weights needs ranks and servers that take turns"),
        (["trainer.park_weights=true", "rollout.max_staleness=1"], "trainer.park_weights needs ranks and servers"),
        (["serving.extra_args=[--mem-fraction-static=0.9]"], "set serving.mem_fraction instead"),
        (["serving.extra_args=[--max-total-tokens, '9']"], "set serving.max_total_tokens instead"),
        (["serving.extra_args=[--enable-memory-saver]"], "set cluster.turns instead"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_work_are_refused_in_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("conf/torl_7b.yaml", overrides)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_who_takes_turns() -> None:
    def turns(*overrides: str, gpu: str = "h100") -> bool:
        config = load_config("conf/torl_7b.yaml", overrides)
        made = analyse(config, Hardware(2, 8, gpu), Assumptions()).placement
        assert made is not None
        return takes_turns(config, made)

    assert turns()
    assert not turns("rollout.max_staleness=1")
    assert not turns("cluster.turns=never")
    assert not turns("rollout.replay=runs/x")
    assert not turns("serving.urls=[http://a:1]")
    assert not turns(gpu="cpu")
    assert turns("cluster.turns=always", gpu="cpu")


def test_the_printed_plans_are_what_the_planner_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/make_plans_doc.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
