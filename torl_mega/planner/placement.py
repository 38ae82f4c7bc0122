"""Which process runs where: node, GPUs, cores, port. The launch scripts start exactly what a placement says.

Contract: ranks are numbered node by node; a server never spans nodes; every process on a node gets cores of its own,
in contiguous blocks (so a rank's cores lie near its GPU on the usual two-socket server). `Placement` travels as JSON
from `torl plan --out` to `planner/role.py`, which stands in each started task.
Limits: all nodes are alike; ports are a block of 1000 per job, below the kernel's ephemeral range (32768 and up); that they
are free is checked by the preflight on each node.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torl_mega.config import Config
from torl_mega.errors import ConfigError
from torl_mega.planner.hardware import GPUS

# Offsets in a job's block of ports. Servers come last: SGLang derives further ports from its own.
MASTER_OFFSET, SANDBOX_OFFSET, SERVER_OFFSET = 0, 1, 100
SERVER_STRIDE = 10


@dataclass(frozen=True, slots=True)
class Process:
    role: str  # "rank", "server" or "sandbox"
    index: int  # global within its role
    node: int
    host: str
    local: int  # index within its role on its node
    gpus: tuple[int, ...]
    cores: tuple[int, int]  # [first, end) of the node's cores
    port: int | None  # None for ranks


@dataclass(frozen=True, slots=True)
class Placement:
    """Every process of a run. `rank_nodes` and `server_nodes` are ranges of node indices, as srun wants them."""

    hosts: tuple[str, ...]
    gpus_per_node: int
    cores_per_node: int
    gpu: str
    colocated: bool
    ranks_per_node: int
    servers_per_node: int
    num_rank_nodes: int  # the first nodes
    num_server_nodes: int  # the last nodes
    master_port: int
    processes: tuple[Process, ...]

    @property
    def world_size(self) -> int:
        return self.ranks_per_node * self.num_rank_nodes

    @property
    def num_servers(self) -> int:
        return self.servers_per_node * self.num_server_nodes

    def of(self, role: str) -> list[Process]:
        return [process for process in self.processes if process.role == role]

    @property
    def server_urls(self) -> list[str]:
        return [f"http://{p.host}:{p.port}" for p in self.of("server")]

    @property
    def sandbox_urls(self) -> list[str]:
        return [f"http://{p.host}:{p.port}" for p in self.of("sandbox")]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_placement(path: str | Path) -> Placement:
    """The placement that `to_json` wrote. Raises ConfigError."""
    try:
        tree = json.loads(Path(path).read_text())
        processes = tuple(
            Process(**{**p, "gpus": tuple(p["gpus"]), "cores": tuple(p["cores"])}) for p in tree["processes"]
        )
        return Placement(**{**tree, "hosts": tuple(tree["hosts"]), "processes": processes})
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path}: not a placement as `torl plan --out` writes it: {exc}") from None


def place(
    config: Config,
    *,
    nodes: int,
    gpus: int,
    gpu: str,
    hosts: tuple[str, ...] = (),
    cores: int = 0,
    base_port: int = 20000,
) -> tuple[Placement | None, list[str]]:
    """The placement and no complaints, or None and every reason why there is none.

    nodes, gpus: the allocation; hosts: their names (n0, n1, ... when not known yet); cores: per node, 0 takes the table's.
    """
    cluster, problems = config.cluster, []
    hosts = hosts or tuple(f"n{i}" for i in range(nodes))
    if nodes < 1 or gpus < 1:
        return None, [f"--nodes {nodes} --gpus {gpus}: both must be at least 1"]
    if len(hosts) != nodes:
        return None, [f"--hosts names {len(hosts)} nodes, --nodes says {nodes}"]
    colocated = cluster.placement == "colocated"
    train_nodes = nodes - cluster.server_nodes
    if train_nodes < 1:
        problems.append(
            f"cluster.server_nodes = {cluster.server_nodes} leaves no node of {nodes} for training; take at most {nodes - 1}"
        )
    train_gpus = gpus - cluster.server_gpus_per_node
    if train_gpus < 1:
        problems.append(
            f"cluster.server_gpus_per_node = {cluster.server_gpus_per_node} leaves none of {gpus} GPUs for training"
        )
    serve_gpus = gpus if colocated or cluster.server_nodes else cluster.server_gpus_per_node
    tensor, ranks = config.serving.tensor, cluster.ranks_per_node or max(1, train_gpus)
    fitting = serve_gpus // tensor
    servers = cluster.servers_per_node or fitting
    if ranks > train_gpus and gpu != "cpu":
        problems.append(f"cluster.ranks_per_node = {ranks} is more than the {train_gpus} training GPUs of a node")
    if fitting < 1 and gpu != "cpu":
        problems.append(
            f"serving.tensor = {tensor} is more than the {serve_gpus} serving GPUs of a node; take at most that"
        )
    elif servers > fitting and gpu != "cpu":
        problems.append(
            f"cluster.servers_per_node = {servers} of serving.tensor = {tensor} need {servers * tensor} GPUs, "
            f"{serve_gpus} of a node serve; take at most {fitting}"
        )
    if problems:
        return None, problems
    cores = cores or gpus * GPUS[gpu].cores
    shape = _Shape(nodes, gpus, cores, colocated, train_nodes, train_gpus, serve_gpus, ranks, max(1, servers), tensor)
    processes = _processes(shape, hosts, base_port, cluster.sandbox_cores)
    if config.rollout.replay is not None:  # trains from a recording: nobody samples, nothing is executed
        processes = tuple(process for process in processes if process.role == "rank")
    num_server_nodes = nodes if not cluster.server_nodes else cluster.server_nodes
    servers_per_node = 0 if config.rollout.replay is not None else shape.servers
    return Placement(
        hosts, gpus, cores, gpu, colocated, ranks, servers_per_node, train_nodes, num_server_nodes,
        base_port + MASTER_OFFSET, processes,
    ), []  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Shape:
    nodes: int
    gpus: int
    cores: int
    colocated: bool
    train_nodes: int
    train_gpus: int
    serve_gpus: int
    ranks: int
    servers: int
    tensor: int


def _processes(shape: _Shape, hosts: tuple[str, ...], base_port: int, sandbox_cores: int) -> tuple[Process, ...]:
    found: list[Process] = []
    whole_nodes = shape.train_nodes < shape.nodes
    first_server_node = shape.train_nodes if whole_nodes else 0
    first_gpu = shape.gpus - shape.serve_gpus
    pool = min(sandbox_cores, max(1, shape.cores // 4))
    for node, host in enumerate(hosts):
        ranks = shape.ranks if node < shape.train_nodes else 0
        servers = shape.servers if node >= first_server_node else 0
        blocks = _blocks(shape.cores - pool, ranks + servers)
        for local in range(ranks):
            gpu = (local % shape.train_gpus,)
            found.append(Process("rank", node * shape.ranks + local, node, host, local, gpu, blocks[local], None))
        for local in range(servers):
            index = (node - first_server_node) * shape.servers + local
            gpus = tuple(first_gpu + (local * shape.tensor + k) % shape.serve_gpus for k in range(shape.tensor))
            port = base_port + SERVER_OFFSET + SERVER_STRIDE * index
            found.append(Process("server", index, node, host, local, gpus, blocks[ranks + local], port))
        found.append(
            Process(
                "sandbox", node, node, host, 0, (), (shape.cores - pool, shape.cores), base_port + SANDBOX_OFFSET + node
            )
        )
    return tuple(found)


def _blocks(cores: int, count: int) -> list[tuple[int, int]]:
    """[0, cores) cut into `count` contiguous blocks, as even as they come; at least one core each."""
    edges = [round(i * cores / max(1, count)) for i in range(count + 1)]
    return [(min(a, max(0, cores - 1)), max(b, a + 1)) for a, b in itertools.pairwise(edges)]
