"""Can the processes of a placement work together? Looks at what would be started, before anything is.

    placement + config ─► commands.py ─► every process: command, environment, GPUs, cores ─► faults, one line each

Contract: pure. What it refuses shows as a hang or a crash minutes after the start: one GPU twice in an NCCL group, an address
that means "yourself" told to another node, cores given twice, ends of one NCCL group that are set up differently.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torl_mega.config import Config
from torl_mega.launch.commands import command, environment
from torl_mega.planner.placement import Placement, Process
from torl_mega.process.address import is_loopback

_ADDRESSES = ("MASTER_ADDR", "TORL_SERVERS", "TORL_SANDBOX")


@dataclass(frozen=True, slots=True)
class Started:
    process: Process
    command: list[str]
    environment: dict[str, str]  # on top of the task's

    def as_json(self) -> dict[str, Any]:
        mine = self.process
        return {
            "process": mine.name, "node": mine.host, "gpus": list(mine.gpus), "cores": list(mine.cores),
            "environment": self.environment, "command": self.command,
        }  # fmt: skip


def everything_started(placement: Placement, config: Config, conf: Path) -> list[Started]:
    """What the tasks of a run start. `conf`: where they read the config."""
    logs = Path("logs")
    return [
        Started(
            mine, command(mine.role, mine, placement, config, str(conf), logs), environment(mine, placement, config)
        )
        for mine in placement.processes
    ]


def faults(placement: Placement, config: Config, started: Sequence[Started]) -> list[str]:
    found = [*_loopback(placement, config, started), *_cores(placement, started)]
    if placement.gpu != "cpu":
        found += [*_gpus_twice(started), *_nccl_settings(started)]
    return found


def _gpus_twice(started: Sequence[Started]) -> Iterator[str]:
    """NCCL refuses two ranks of a group on one GPU."""
    processes = [each.process for each in started]
    ranks = [mine for mine in processes if mine.role == "rank"]
    servers = [mine for mine in processes if mine.role == "server"]
    groups = {"the trainer": ranks, **{server.name: [server] for server in servers}}
    if any(each.environment.get("TORL_TRANSPORT") == "broadcast" for each in started):
        groups["the weight group (serving.transport = broadcast)"] = [*ranks[:1], *servers]
    for name, members in groups.items():
        uses = Counter((member.host, gpu) for member in members for gpu in member.gpus)
        for (host, gpu), times in uses.items():
            if times > 1:
                yield f"{name} has GPU {gpu} of {host} {times} times, which NCCL refuses; give its processes GPUs of their own"
                break


def _loopback(placement: Placement, config: Config, started: Sequence[Started]) -> Iterator[str]:
    if len(placement.hosts) < 2:
        return
    told = {config.serving.sync_host: "serving.sync_host", config.serving.router: "serving.router"}
    for each in started:  # most are told the same: each text once, with the first that is told
        for name in _ADDRESSES:
            told.setdefault(each.environment.get(name), f"{name} of {each.process.name}")
        for word, after in itertools.pairwise(each.command):
            if word == "--host":
                told.setdefault(after, f"--host of {each.process.name}")
    for text, name in told.items():
        for address in text.split(",") if text else ():
            host = urlsplit(address).hostname if "//" in address else address
            if address.startswith("unix:") or is_loopback(host or ""):
                yield f"{name} = {address}, which on another node is that node itself; give an address that all nodes reach"


def _cores(placement: Placement, started: Sequence[Started]) -> Iterator[str]:
    """Processes share cores only where a node has fewer cores than processes."""
    on_host: dict[str, list[Process]] = defaultdict(list)
    for each in started:
        on_host[each.process.host].append(each.process)
    for host, mine in on_host.items():
        pool = sum(last - first for first, last in (p.cores for p in mine if p.role == "sandbox"))
        if sum(p.role != "sandbox" for p in mine) > placement.cores_per_node - pool:
            continue
        for a, b in itertools.pairwise(sorted(mine, key=lambda process: process.cores)):
            if b.cores[0] < a.cores[1]:
                yield f"{a.name} and {b.name} on {host} share core {b.cores[0]}; give each cores of its own"


def _nccl_settings(started: Sequence[Started]) -> Iterator[str]:
    """Ranks and servers meet in one NCCL group; what differs there hangs or crashes."""
    ends = [each for each in started if each.process.role in ("rank", "server")]
    for name in sorted({name for each in ends for name in each.environment if name.startswith("NCCL_")}):
        values = {each.environment.get(name, "(not set)"): each.process.name for each in reversed(ends)}
        if len(values) > 1:
            said = ", ".join(f"{value} for {process}" for value, process in sorted(values.items()))
            yield f"{name} is {said}; ends of one NCCL group must agree, see launch/gpu_env.py"
