"""The preflight of a job: every node checks itself against the placement; one table says what is wrong where."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from torl_mega.launch.checks import Check, guarded, judged
from torl_mega.planner.placement import Placement
from torl_mega.process.start import port_in_use


def this_node() -> str:
    """Slurm's name for this node, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def placement_checks(placement: Placement, node: str) -> list[Check]:
    return [*guarded("host names", lambda: _hosts(placement)), *guarded("ports", lambda: _ports(placement, node))]


def collected(report: Path, placement: Placement) -> dict[str, list[Check]]:
    """What each node has found; a node that did not report has failed."""
    nodes: dict[str, list[Check]] = {}
    for index, host in enumerate(placement.hosts):
        file = report / f"{host}.json"
        if file.exists():
            nodes[host] = [Check(**entry) for entry in json.loads(file.read_text())]
        else:
            log = report / f"{index}.log"
            said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
            nodes[host] = [Check("preflight", "fail", f"did not report: {said[0] if said else 'no output'}")]
    return nodes


def _hosts(placement: Placement) -> Iterator[Check]:
    unknown = []
    for host in placement.hosts:
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            unknown.append(host)
    known = len(placement.hosts) - len(unknown)
    yield judged("host names", not unknown, f"{known} resolved", f"{', '.join(unknown)} cannot be resolved here")


def _ports(placement: Placement, node: str) -> Iterator[Check]:
    mine = {f"{p.role} {p.index}": p.port for p in placement.processes if p.host == node and p.port is not None}
    if node == placement.hosts[0]:
        mine["ranks"] = placement.master_port
    taken = [f"{port} ({name})" for name, port in mine.items() if port_in_use("", port)]
    remedy = f"taken on {node}: {', '.join(taken)}; another job of yours may still be ending there"
    yield judged("ports", not taken, f"{len(mine) - len(taken)} free", remedy)
