"""One machine and a Slurm allocation start the same processes; what differs is where they are found."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, DataError
from torl_mega.launch import local
from torl_mega.launch.commands import command, environment, sglang_python, task_command
from torl_mega.launch.inputs import check_inputs, freeze
from torl_mega.launch.place import HERE, place_here, with_addresses
from torl_mega.planner.placement import Placement, place
from torl_mega.run.folder import lock_run, open_run

GPU = "NVIDIA H100 80GB HBM3\n"


def quick(*overrides: str) -> Config:
    return load_config("conf/quickstart.yaml", overrides)


def at_home(config: Config, folder: Path, *, trains: bool = True) -> Placement:
    return with_addresses(place_here(config, trains=trains), folder)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`gpus(n)` puts an nvidia-smi with `n` GPUs in front of PATH."""

    def found(number: int) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'E'\n{GPU * number}E\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return found


def started(placement: Placement, config: Config, logs: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Command and environment of every process, with `ADDRESS` for every address."""

    def plain(text: str) -> str:
        return re.sub(r"unix:\S+|http://\S+?:\d+|\b\d{5}\b|\b127\.0\.0\.1\b|\bnode7\b", "ADDRESS", text)

    found = []
    for mine in placement.processes:
        words = " ".join(command(mine.role, mine, placement, config, "conf.yaml", logs))
        words = re.sub(r"--socket \S+|--host \S+ --port \S+", "ADDRESS", words)
        env = {name: plain(value) for name, value in environment(mine, placement, config).items()}
        found.append((plain(words).split(), env))
    return found


@pytest.mark.parametrize("number", [0, 2])
def test_a_laptop_and_slurm_start_the_same_but_for_addresses(gpus, tmp_path: Path, number: int) -> None:
    gpus(number)
    sizes = ["cluster.servers_per_node=2", "serving.num_servers=2", "cluster.ranks_per_node=2", "parallel.tensor=2"]
    config = quick(*sizes, "cluster.gpu=h100" if number else "cluster.gpu=cpu")
    here = at_home(config, tmp_path)
    cores = here.cores_per_node
    there, problems = place(
        config, nodes=1, gpus=number or 1, gpu=config.cluster.gpu, hosts=("node7",), cores=cores, base_port=21000
    )
    assert there is not None, problems
    assert [p.name for p in here.processes] == [p.name for p in there.processes]
    assert started(here, config, tmp_path) == started(there, config, tmp_path)
    assert replace(here, hosts=(), processes=(), master_port=0) == replace(there, hosts=(), processes=(), master_port=0)


def test_launchers_start_tasks_and_nothing_else() -> None:
    script = Path("launch/common.sh").read_text()
    steps = re.findall(r"-m (torl_mega\S+)", script[script.index("torl_tasks()") :])
    assert steps == ["torl_mega.launch.task"]
    assert task_command("server", Path("p"), Path("c"))[1:] == ["-m", "torl_mega.launch.task", "server", "p", "c"]


# ------------------------------------------------------------------------------------------- on this machine


def test_without_gpus_the_config_counts_and_nobody_is_pinned(gpus, tmp_path: Path) -> None:
    gpus(0)
    made = at_home(quick("parallel.tensor=2", "parallel.data=2", "serving.num_servers=3"), tmp_path)
    assert (made.world_size, made.num_servers, len(made.of("sandbox"))) == (4, 3, 1)
    everything = (0, len(os.sched_getaffinity(0)))
    assert {p.cores for p in made.processes} == {everything}
    assert made.addresses("sandbox") == (f"unix:{tmp_path}/sandbox_0/socket",)
    assert len({*made.addresses("server"), f"http://{HERE}:{made.master_port}"}) == 4
    assert "OMP_NUM_THREADS" not in environment(made.of("rank")[0], made, quick())


def test_no_port_is_given_out_twice(gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    draws = iter([20000, 20000, 20002, 20000, 20004])
    monkeypatch.setattr("torl_mega.launch.place.free_port", lambda: next(draws))
    made = at_home(quick("serving.num_servers=2"), tmp_path)
    assert {made.master_port, *(p.port for p in made.of("server"))} == {20000, 20002, 20004}


def test_gpus_that_are_there_are_taken_as_the_cluster_section_says(gpus, tmp_path: Path) -> None:
    gpus(8)
    made = at_home(load_config("conf/torl_7b.yaml"), tmp_path)
    assert made.world_size == 8
    split = ["cluster.placement=disaggregated", "cluster.server_gpus_per_node=4", "serving.tensor=2"]
    made = at_home(load_config("conf/torl_7b.yaml", split), tmp_path)
    assert [p.gpus for p in made.of("server")] == [(4, 5), (6, 7)]
    words = command("server", made.of("server")[1], made, quick(), "c", tmp_path)
    assert words[words.index("--gpu-ids") + 1] == "6,7"
    made = at_home(load_config("conf/torl_7b.yaml", split), tmp_path, trains=False)
    assert (made.world_size, made.of("rank")[0].gpus) == (1, ())
    assert [g for p in made.of("server") for g in p.gpus] == list(range(8))
    with pytest.raises(ConfigError, match="leaves no node of 1 for training"):
        place_here(load_config("conf/clusters/torl_7b_4xh100_split.yaml"), trains=True)


def test_cuda_visible_devices_are_the_gpus_of_this_machine(
    gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    made = at_home(quick(), tmp_path)
    assert made.world_size == 2
    words = [command("server", p, made, quick(), "c", tmp_path) for p in made.of("server")]
    assert [w[w.index("--gpu-ids") + 1] for w in words] == ["5", "3"]


@pytest.mark.parametrize(("number", "visible", "expected"), [(0, "0", 0), (8, "-1", 0), (8, "", 0), (8, "2,-1,3", 1)])
def test_gpus_are_counted_as_cuda_counts_them(
    gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, visible: str, expected: int
) -> None:
    gpus(number)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = at_home(quick(), tmp_path)
    assert (made.gpu, made.gpus_per_node) == (("h100", expected) if expected else ("cpu", 1))


def test_a_cpu_config_hides_the_gpus(gpus, tmp_path: Path) -> None:
    gpus(8)
    config = quick("cluster.gpu=cpu")
    made = at_home(config, tmp_path)
    assert made.world_size == 1
    assert all(environment(p, made, config)["CUDA_VISIBLE_DEVICES"] == "" for p in made.processes)
    assert "--gpu-ids" not in command("server", made.of("server")[0], made, config, "c", tmp_path)


def test_services_that_run_already_are_used(gpus, tmp_path: Path) -> None:
    gpus(0)
    config = quick("serving.urls=[http://a:1,http://b:2]", "sandbox.address=http://c:3")
    made = at_home(config, tmp_path)
    assert {p.role for p in made.processes} == {"rank"}
    env = environment(made.of("rank")[0], made, config)
    assert (env["TORL_SERVERS"], env["TORL_SANDBOX"]) == ("http://a:1,http://b:2", "http://c:3")


def test_a_replay_starts_ranks_only(gpus, tmp_path: Path) -> None:
    gpus(0)
    assert {p.role for p in at_home(quick("rollout.replay=runs/x"), tmp_path).processes} == {"rank"}


def test_sglang_has_one_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORL_SGLANG_PYTHON", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert sglang_python() == sys.executable
    beside = tmp_path / "sglang" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert sglang_python() == str(beside)
    monkeypatch.setenv("TORL_SGLANG_PYTHON", "/opt/sglang/bin/python")
    assert sglang_python() == "/opt/sglang/bin/python"


def test_a_second_start_leaves_the_first_ones_config_alone(tmp_path: Path) -> None:
    folder = open_run(quick(f"runs_dir={tmp_path}"))
    written = (folder.path / "config.json").read_bytes()
    lock = lock_run(folder)
    with pytest.raises(ConfigError, match="in use by another process"):
        local.train(quick(f"runs_dir={tmp_path}", "num_steps=99"))
    os.close(lock)
    assert (folder.path / "config.json").read_bytes() == written


def test_absent_benchmarks_are_left_out_as_long_as_one_is_there() -> None:
    check_inputs(quick("eval.data=[arithmetic:1,data/aime24.jsonl]"), 1)
    for wrong in ("data/aime24.jsonl", "arithmetic:1,data/mine.jsonl"):
        with pytest.raises(DataError, match=r"eval.data = 'data/.*' is not there"):
            check_inputs(quick(f"eval.data=[{wrong}]"), 1)


@pytest.mark.parametrize("program", ["eval", "rollout"])
def test_collecting_alone_never_writes_into_a_training_run(tmp_path: Path, program: str) -> None:
    config = quick(f"runs_dir={tmp_path}")
    open_run(config).checkpoints.mkdir()
    with pytest.raises(ConfigError, match=r"holds a training run.*name="):
        local.collect(program, config, json=False)


def test_what_would_have_nothing_to_do_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval.data is empty"):
        local.collect("eval", quick(f"runs_dir={tmp_path}", "eval.data=[]"), json=False)
    with pytest.raises(DataError, match=r"rollout.replay = 'gone' is no run"):
        local.train(quick(f"runs_dir={tmp_path}", "rollout.replay=gone"))
    assert not list(tmp_path.iterdir())


def test_the_frozen_config_is_the_config(tmp_path: Path) -> None:
    config = quick(f"runs_dir={tmp_path}", "optim.lr=1e-6")
    assert load_config(freeze(config, open_run(config), "local")) == config
