"""What would be started is looked at before it is: every shipped config passes, a planted copy of each fault does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.launch.check_commands import Started, everything_started, faults
from torl_mega.launch.plan import PlanOptions, run
from torl_mega.planner.placement import Placement, place

SPLIT = ["cluster.placement=disaggregated", "cluster.server_gpus_per_node=4", "parallel.tensor=2"]
SHIPPED = [
    ("conf/torl_1.5b.yaml", 1, []),
    ("conf/torl_1.5b.yaml", 1, [*SPLIT, "parallel.sequence=true"]),
    ("conf/torl_7b.yaml", 1, []),
    ("conf/torl_7b.yaml", 1, SPLIT),
    ("conf/torl_7b.yaml", 2, []),
    ("conf/torl_7b.yaml", 2, SPLIT),
    ("conf/torl_32b.yaml", 4, []),
    ("conf/torl_32b.yaml", 4, ["cluster.placement=disaggregated", "cluster.server_nodes=1"]),
    *[(str(path), 0, []) for path in sorted(Path("conf/clusters").glob("*.yaml"))],
]


def started(conf: str, nodes: int, overrides: list[str]) -> tuple[Placement, Config, list[Started]]:
    config = load_config(conf, overrides)
    placement, problems = place(
        config, nodes=nodes or config.cluster.nodes, gpus=config.cluster.gpus_per_node, gpu=config.cluster.gpu
    )
    assert placement is not None, problems
    return placement, config, everything_started(placement, config, Path(conf))


@pytest.mark.parametrize(("conf", "nodes", "overrides"), SHIPPED, ids=lambda value: str(value)[-40:])
def test_what_is_shipped_can_work_together(conf: str, nodes: int, overrides: list[str]) -> None:
    placement, config, processes = started(conf, nodes, overrides)
    assert [each.process for each in processes] == list(placement.processes)
    assert faults(placement, config, processes) == []


def changed(processes: list[Started], name: str, **environment: str) -> list[Started]:
    """With these variables for one process."""
    return [
        replace(each, environment=each.environment | environment) if each.process.name == name else each
        for each in processes
    ]


def moved(processes: list[Started], name: str, **change) -> list[Started]:
    """With another place for one process."""
    return [
        replace(each, process=replace(each.process, **change)) if each.process.name == name else each
        for each in processes
    ]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda all_: moved(all_, "rank_3", gpus=(2,)), "the trainer has GPU 2 of n0 2 times"),
        (lambda all_: moved(all_, "server_1", gpus=(6, 6)), "server_1 has GPU 6 of n0 2 times"),
        (
            lambda all_: changed(moved(all_, "server_0", gpus=(0, 1)), "rank_0", TORL_TRANSPORT="broadcast"),
            "the weight group (serving.transport = broadcast) has GPU 0 of n0 2 times",
        ),
        (lambda all_: moved(all_, "server_0", cores=(0, 9)), "server_0 and rank_0 on n0 share core 0"),
        (lambda all_: changed(all_, "rank_1", MASTER_ADDR="127.0.0.1"), "MASTER_ADDR of rank_1 = 127.0.0.1"),
        (lambda all_: changed(all_, "rank_0", TORL_SERVERS="http://n0:1,http://127.0.1.1:2"), "= http://127.0.1.1:2"),
        (lambda all_: changed(all_, "rank_0", TORL_SANDBOX="http://localhost:2"), "= http://localhost:2"),
        (lambda all_: changed(all_, "rank_0", TORL_SANDBOX="unix:/tmp/s"), "= unix:/tmp/s"),
        (
            lambda all_: [replace(e, command=[{"n1": "::1"}.get(w, w) for w in e.command]) for e in all_],
            "--host of server_2 = ::1",
        ),
        (lambda all_: changed(all_, "server_2", NCCL_CUMEM_ENABLE="1"), "NCCL_CUMEM_ENABLE is 0 for rank_0, 1 for server_2"),
        (lambda all_: changed(all_, "rank_0", NCCL_PROTO="LL"), "NCCL_PROTO is (not set) for rank_1, LL for rank_0"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(plant, said: str) -> None:
    placement, config, processes = started("conf/torl_7b.yaml", 2, SPLIT)
    assert faults(placement, config, processes) == []
    found = faults(placement, config, plant(processes))
    assert any(said in fault for fault in found), found


def test_rank_0s_own_address_must_leave_its_node() -> None:
    placement, config, processes = started("conf/torl_7b.yaml", 2, [*SPLIT, "serving.sync_host=127.0.0.1"])
    assert ["serving.sync_host = 127.0.0.1" in fault for fault in faults(placement, config, processes)] == [True]
    alone = started("conf/torl_7b.yaml", 1, [*SPLIT, "serving.sync_host=127.0.0.1"])
    assert faults(*alone) == []


def test_the_plan_refuses_what_the_checker_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Path("conf/torl_7b.yaml"), ["serving.sync_host=localhost"]) == 1
    assert "NO: serving.sync_host = localhost" in capsys.readouterr().out


def test_the_plan_prints_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    conf = Path("conf/clusters/torl_7b_4xh100_split.yaml")
    assert run(conf, options=PlanOptions(commands=True, json_output=True)) == 0
    tree = json.loads(capsys.readouterr().out)
    names = [each["process"] for each in tree["commands"]]
    assert len(names) == 16 + 8 + 4
    rank, server = (tree["commands"][names.index(name)] for name in ("rank_8", "server_7"))
    assert (rank["node"], rank["gpus"], rank["environment"]["RANK"]) == ("n1", [0], "8")
    assert (server["node"], server["gpus"]) == ("n3", [6, 7])
    assert server["command"][server["command"].index("--gpu-ids") + 1] == "6,7"
    assert server["environment"]["NCCL_CUMEM_ENABLE"] == rank["environment"]["NCCL_CUMEM_ENABLE"]
    assert run(conf, options=PlanOptions(commands=True)) == 0
    out = capsys.readouterr().out
    assert "# server_7 on n3, cores " in out
    assert ", GPUs 6,7\nenv " in out
