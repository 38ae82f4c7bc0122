"""Cores near the GPU, for topologies of usual servers."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from torl_mega.config_file import load_config
from torl_mega.launch.cores import Topology, pin, read_topology
from torl_mega.planner.placement import Process, place


def sockets(num: int, cores: int, *, threads: int) -> dict[int, list[tuple[int, ...]]]:
    """Numbered as Linux does: all first threads socket by socket, then all second ones."""
    return {
        numa: [tuple(t * num * cores + numa * cores + core for t in range(threads)) for core in range(cores)]
        for numa in range(num)
    }


H100 = Topology(sockets(2, 56, threads=2), (0, 0, 0, 0, 1, 1, 1, 1))
"""2 x 56 cores with hyper-threads: 0-55 and 112-167 on the first socket, 56-111 and 168-223 on the second."""
MILAN = Topology(sockets(8, 16, threads=2), (3, 3, 1, 1, 7, 7, 5, 5))
"""DGX A100, NPS 4: GPUs sit at four of the eight NUMA nodes, and not in their order."""


def node(*overrides: str, cores: int) -> list[Process]:
    placement, problems = place(load_config("conf/torl_7b.yaml", overrides), nodes=1, gpus=8, gpu="h100", cores=cores)
    assert placement is not None, problems
    return list(placement.processes)


@pytest.mark.parametrize("topology", [H100, MILAN, Topology(sockets(2, 48, threads=1), H100.gpus)])
@pytest.mark.parametrize("overrides", [[], ["cluster.placement=disaggregated", "cluster.server_gpus_per_node=4"]])
def test_everybody_has_whole_cores_of_its_own_by_its_gpu(topology: Topology, overrides: list[str]) -> None:
    cores = {cpu: numa for numa, all_ in topology.cores.items() for core in all_ for cpu in core}
    processes = node(*overrides, cores=len(cores))
    pinned = pin(processes, topology)
    assert pinned is not None
    assert set(pinned) == {process.name for process in processes}
    for a, b in itertools.combinations(pinned.values(), 2):
        assert not a & b
    for all_ in topology.cores.values():
        for core in all_:
            assert sum(set(core) <= mine for mine in pinned.values()) == 1, core
    for process in processes:
        if process.role != "sandbox":
            assert {cores[cpu] for cpu in pinned[process.name]} == {topology.gpus[process.gpus[0]]}, process
    pool = next(process for process in processes if process.role == "sandbox")
    assert abs(len(pinned["sandbox_0"]) - (pool.cores[1] - pool.cores[0])) <= 4 or topology is MILAN


def test_numbers_that_look_near_are_not() -> None:
    """What contiguous blocks give the last rank are the second threads of the first rank's cores."""
    processes = node(cores=224)
    last = next(p for p in processes if p.name == "rank_7")
    first_core_of_rank_0 = (0, 112)
    assert last.cores == (112, 128)
    pinned = pin(processes, H100)
    assert pinned is not None
    assert set(first_core_of_rank_0) <= pinned["rank_0"]
    assert all(cpu % 112 >= 56 for cpu in pinned["rank_7"])


def test_a_pool_prefers_numa_nodes_without_a_gpu_at_work() -> None:
    pinned = pin(node(cores=256), MILAN)
    assert pinned is not None
    assert pinned["sandbox_0"] == {cpu for numa in (0, 2, 4, 6) for core in MILAN.cores[numa] for cpu in core}


@pytest.mark.parametrize(
    "topology",
    [
        Topology(H100.cores, ()),  # no nvidia-smi
        Topology(H100.cores, (-1,) * 8),  # a machine that does not say
        Topology(sockets(2, 4, threads=1), H100.gpus),  # fewer cores than processes
    ],
)
def test_what_is_not_known_is_left_to_the_blocks(topology: Topology) -> None:
    assert pin(node(cores=224), topology) is None


def test_sys_and_nvidia_smi_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 2 cores with hyper-threads, three of whose GPUs are ours in an order of our own; CPU 7 is not ours."""
    for numa, cpus in enumerate(["0-1,4-5", "2-3,6-7"]):
        put(tmp_path / f"devices/system/node/node{numa}/cpulist", cpus)
    for cpu in range(8):
        put(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    for bus, numa in (("18", 0), ("3a", 0), ("9d", 1)):
        put(tmp_path / f"bus/pci/devices/0000:{bus}:00.0/numa_node", str(numa))
    tool = tmp_path / "nvidia-smi"
    put(tool, "#!/bin/sh\nprintf '00000000:18:00.0\\n00000000:3A:00.0\\n00000000:9D:00.0\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,1")
    found = read_topology(range(7), tmp_path)
    assert found == Topology({0: [(0, 4), (1, 5)], 1: [(2, 6), (3,)]}, (1, 0, 0))
    put(tmp_path / "bus/pci/devices/0000:3a:00.0/numa_node", "")
    assert read_topology(range(7), tmp_path) is None


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_this_machine_is_read() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    found = read_topology(allowed)
    assert found is not None
    assert sorted(cpu for cores in found.cores.values() for core in cores for cpu in core) == allowed
