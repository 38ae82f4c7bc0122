"""Placements without a plan: of a run on this machine, and of a run without a trainer on a cluster.

    python -m torl_mega.launch.place CONF --nodes N --gpus G --hosts A,B --cores C --base-port P --out FILE   (eval.slurm)

Contract: with GPUs here the config's `cluster` section says who gets which, for as many as there are; without, or with
`cluster.gpu: cpu`, there are `parallel.world_size` ranks and `serving.num_servers` servers, all on all cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from torl_mega.config import ClusterConfig, Config
from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, TorlError
from torl_mega.planner.placement import Placement, Process, place
from torl_mega.process.start import free_port

HERE = "127.0.0.1"


def place_here(config: Config, *, trains: bool) -> Placement:
    """The placement on this machine, its addresses still to be chosen. Raises ConfigError with every reason against."""
    gpus = 0 if config.cluster.gpu == "cpu" else _num_gpus()
    cores, cluster = len(os.sched_getaffinity(0)), config.cluster
    if not gpus:
        ranks, servers = config.parallel.world_size, config.serving.num_servers
        cluster = ClusterConfig(gpu="cpu", ranks_per_node=ranks, servers_per_node=servers)
    found, problems = place(
        config.model_copy(update={"cluster": cluster}),
        nodes=1, gpus=gpus or 1, gpu=cluster.gpu, hosts=(HERE,), cores=cores, trains=trains,
    )  # fmt: skip
    if found is None:
        raise ConfigError("; ".join(problems))
    if gpus:
        return found
    return replace(found, processes=tuple(replace(process, cores=(0, cores)) for process in found.processes))


def with_addresses(placement: Placement, scratch: Path) -> Placement:
    """The placement with ports that are free now; the sandbox listens on a unix socket in its own folder of `scratch`."""
    ports: set[int] = set()
    while len(ports) <= len(placement.of("server")):  # one draw may repeat another
        ports.add(free_port())

    def addressed(process: Process) -> Process:
        if process.role == "sandbox":
            return replace(process, port=None, socket=str(scratch / process.name / "socket"))
        return replace(process, port=ports.pop()) if process.role == "server" else process

    return replace(placement, master_port=ports.pop(), processes=tuple(map(addressed, placement.processes)))


def nvidia_smi(column: str, *columns: str) -> list[list[str]]:
    """One row per GPU of this machine, none where there is no nvidia-smi. Raises ConfigError when that fails. There is no row
    without a column: asked for none, nvidia-smi says nothing and succeeds."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join((column, *columns))}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ConfigError(f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}")
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.strip().splitlines()]


def _num_gpus() -> int:
    """As CUDA counts: where there are any, those that CUDA_VISIBLE_DEVICES names before an empty name or -1."""
    there, chosen = len(nvidia_smi("name")), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not there:
        return there
    named = itertools.takewhile(lambda name: name not in ("", "-1"), map(str.strip, chosen.split(",")))
    return len(list(named))


def main() -> int:
    parser = argparse.ArgumentParser(description="Place a run without a trainer: every GPU serves.")
    parser.add_argument("conf", type=Path)
    for name, kind in {"nodes": int, "gpus": int, "hosts": str, "cores": int, "base-port": int, "out": Path}.items():
        parser.add_argument(f"--{name}", type=kind)
    args = parser.parse_args()
    try:
        config = load_config(args.conf)
        found, problems = place(
            config, nodes=args.nodes or config.cluster.nodes, gpus=args.gpus or config.cluster.gpus_per_node,
            gpu=config.cluster.gpu, hosts=tuple(args.hosts.split(",")) if args.hosts else (),
            cores=args.cores or 0, base_port=args.base_port or 20000, trains=False,
        )  # fmt: skip
        if found is None:
            raise ConfigError("; ".join(problems))
        if args.out is not None:
            args.out.write_text(found.to_json())
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
