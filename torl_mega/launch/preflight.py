"""The preflight of a job: every node checks itself against the placement; one table says what is wrong where.

    each node ─► REPORT/<node>.json: checks, and its address ─► one table of all nodes, and the addresses into the placement

How the other nodes reach a node only that node knows: its name may resolve to loopback there, or TORL_IFNAME may choose.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from torl_mega.errors import ConfigError
from torl_mega.launch.checks import Check, guarded, judged
from torl_mega.planner.placement import Placement, Process
from torl_mega.process.address import interface_of, is_loopback, own_address
from torl_mega.process.start import port_in_use
from torl_mega.serving.sglang_server import ranks_port


def this_node() -> str:
    """Slurm's name for this node, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def placement_checks(placement: Placement, node: str) -> list[Check]:
    return [
        *guarded("host names", lambda: _hosts(placement)),
        *guarded("address", lambda: _address(placement, node)),
        *guarded("ports", lambda: _ports(placement, node)),
    ]


def write_report(report: Path, placement: Placement, node: str, found: list[Check]) -> None:
    address = None
    with contextlib.suppress(ConfigError):  # which the checks say
        address = own_address(_others(placement, node))
    tree = {"checks": [asdict(check) for check in found], "address": address}
    tree["interface"] = interface_of(address) if address and _others(placement, node) else None
    (report / f"{node}.json").write_text(json.dumps(tree))


def with_node_addresses(placement: Placement, report: Path) -> Placement:
    """The placement with what every node reported of itself. All of them have."""
    told = {host: json.loads((report / f"{host}.json").read_text()) for host in placement.hosts}

    def addressed(process: Process) -> Process:
        return replace(process, ip=told[process.host]["address"], interface=told[process.host]["interface"])

    return replace(placement, processes=tuple(map(addressed, placement.processes)))


def collected(report: Path, placement: Placement) -> dict[str, list[Check]]:
    """What each node has found; a node that did not report has failed."""
    nodes: dict[str, list[Check]] = {}
    for index, host in enumerate(placement.hosts):
        file = report / f"{host}.json"
        if file.exists():
            nodes[host] = [Check(**entry) for entry in json.loads(file.read_text())["checks"]]
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


def _others(placement: Placement, node: str) -> list[str]:
    return [host for host in placement.hosts if host != node]


def _address(placement: Placement, node: str) -> Iterator[Check]:
    address, chosen = own_address(_others(placement, node)), os.environ.get("TORL_IFNAME")
    leaves = not is_loopback(address) or not _others(placement, node) or chosen is not None
    remedy = f"the names of the other nodes resolve to loopback on {node}; mend /etc/hosts or DNS, or set TORL_IFNAME"
    yield judged("address", leaves, f"{address} on {interface_of(address)}", remedy)


def _ports(placement: Placement, node: str) -> Iterator[Check]:
    mine = {f"{p.role} {p.index}": p.port for p in placement.processes if p.host == node and p.port is not None}
    servers = [p for p in placement.of("server") if p.host == node]
    mine |= {f"ranks of server {p.index}": ranks_port(p.port) for p in servers if p.port is not None}
    if node == placement.hosts[0]:
        mine["ranks"] = placement.master_port
    taken = [f"{port} ({name})" for name, port in mine.items() if port_in_use("", port)]
    remedy = f"taken on {node}: {', '.join(taken)}; another job of yours may still be ending there"
    yield judged("ports", not taken, f"{len(mine) - len(taken)} free", remedy)
