"""The command and the environment of every process of a run: the same on a laptop, under Slurm, and in what is printed.

    srun, or torl train ──► task_command ──► launch/task.py ──► command + environment ──► rank, server, sandbox

Pure functions of placement, config and this environment; nothing is started here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torl_mega.config import Config
from torl_mega.launch.gpu_env import gpu_environment
from torl_mega.layout import describe_model
from torl_mega.planner.hardware import GPUS, Assumptions
from torl_mega.planner.known_models import hf_config
from torl_mega.planner.memory import server_memory
from torl_mega.planner.placement import Placement, Process, takes_turns, weight_transport

PROGRAMS = {
    "rank": ["torl_mega.train"],
    "pretrain": ["torl_mega.pretrain"],
    "eval": ["torl_mega.rollout.standalone", "eval"],
    "rollout": ["torl_mega.rollout.standalone", "rollout"],
    "try": ["torl_mega.rollout.standalone", "try"],
}
"""What may stand in the place of a placement's ranks: the trainer, one of texts, or a program that collects without one."""


def task_command(role: str, placement: Path, conf: Path) -> list[str]:
    """What a launcher starts for each process. `role`: server, sandbox or one of PROGRAMS; `conf`: the frozen config."""
    return [sys.executable, "-m", "torl_mega.launch.task", role, str(placement), str(conf)]


def command(role: str, mine: Process, placement: Placement, config: Config, conf: str, logs: Path) -> list[str]:
    """What the task of `mine` starts. `logs`: the folder of this attempt's logs."""
    if role in PROGRAMS:
        return [sys.executable, "-m", *PROGRAMS[role], conf]
    where = ["--socket", mine.socket] if mine.socket else ["--host", mine.reached_at, "--port", str(mine.port)]
    if role == "sandbox":
        return [sys.executable, "-m", "torl_mega.sandbox.serve", *where, "--settings", config.sandbox.model_dump_json()]
    room = ["--in-turns"] if takes_turns(config, placement) else []
    if placement.gpu != "cpu":
        shape, assume = describe_model(hf_config(config.model.path)), Assumptions()
        memory = server_memory(shape, config, GPUS[placement.gpu], assume)
        room += ["--kv-tokens", str(int(memory.kv_tokens)), "--mem-fraction", str(memory.mem_fraction)]
        room += ["--gpu-ids", ",".join(map(device_number, mine.gpus))]
    log = ["--log", str(logs / f"sglang_{mine.index}.log")]
    return [sglang_python(), "-m", "torl_mega.serving.serve", conf, *where, *room, *log]


def environment(mine: Process, placement: Placement, config: Config) -> dict[str, str]:
    """What the process gets on top of its task's environment. A rank: torchrun's names, and where the side-cars are."""
    without_gpus = {"CUDA_VISIBLE_DEVICES": ""}  # the machine may have some all the same
    env = without_gpus if placement.gpu == "cpu" else gpu_environment(config.runs_dir, os.environ)
    if mine.interface:  # gloo by itself takes what the host's own name resolves to: loopback on Debian
        env["GLOO_SOCKET_IFNAME"] = mine.interface
        if "TORL_IFNAME" in os.environ:  # NCCL by itself takes all but loopback
            env["NCCL_SOCKET_IFNAME"] = mine.interface
    if mine.role != "rank":
        return env
    if placement.gpu == "cpu":
        # threads that spin while they wait take the cores from servers and sandbox, in a rank's first step for seconds
        env["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    else:  # on a CPU the trainer knows best how many threads: see trainer/parallel.py
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, mine.cores[1] - mine.cores[0])))
    sandbox = config.sandbox.address
    return env | {
        "RANK": str(mine.index),
        "WORLD_SIZE": str(placement.world_size),
        "LOCAL_RANK": str(mine.local),
        "LOCAL_WORLD_SIZE": str(placement.ranks_per_node),
        "MASTER_ADDR": placement.of("rank")[0].reached_at,
        "MASTER_PORT": str(placement.master_port),
        "TORL_SERVERS": ",".join(config.serving.urls or placement.addresses("server")),
        "TORL_TRANSPORT": weight_transport(config, placement),
        "TORL_OWNERS": "" if config.serving.urls else placement.owners,
        "TORL_TURNS": "1" if takes_turns(config, placement) else "",
        "TORL_SANDBOX": ",".join([sandbox] if sandbox else placement.addresses("sandbox")),
        "PYTHONFAULTHANDLER": "1",  # SIGABRT prints the stack of every thread
    }


def sglang_python() -> str:
    """The Python that has SGLang: TORL_SGLANG_PYTHON, else an environment inside ours (on GPUs SGLang's torch is not the
    trainer's), else ours."""
    beside = Path(sys.prefix) / "sglang" / "bin" / "python"
    return os.environ.get("TORL_SGLANG_PYTHON") or str(beside if beside.exists() else sys.executable)


def device_number(gpu: int) -> str:
    """The driver's number of the node's `gpu`th GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[gpu] if gpu < len(visible) and visible[gpu].isdigit() else str(gpu)
