"""Which process runs where: node, GPUs, cores, address. The launchers start exactly what a placement says.

Contract: ranks are numbered node by node; a server never spans nodes; every process on a node gets cores of its own.
`Placement` travels as JSON to `launch/task.py`, which stands in each started task; which of a node's cores lie near a
process's GPU is known there (launch/cores.py), and this plan's contiguous blocks are their numbers.
Limits: all nodes are alike; ports are a block of 1000 per job, below the kernel's ephemeral range (32768 and up); that they
are free is checked by the preflight on each node.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from torl_mega.config import Config
from torl_mega.errors import ConfigError
from torl_mega.planner.hardware import GPUS

# Offsets in a job's block of ports. Servers come last: SGLang derives further ports from its own.
MASTER_OFFSET, SANDBOX_OFFSET, SERVER_OFFSET = 0, 1, 100
SERVER_STRIDE = 10
# Nodes of a small cluster may share one host, so their ports differ; of a large one those of far nodes come again.
SANDBOX_SLOTS = SERVER_OFFSET - SANDBOX_OFFSET
SERVER_SLOTS = (1000 - SERVER_OFFSET) // SERVER_STRIDE


@dataclass(frozen=True, slots=True)
class Process:
    role: str  # "rank", "server" or "sandbox"; in a run without a trainer, rank 0 is the program that collects
    index: int  # global within its role
    node: int
    host: str
    local: int  # index within its role on its node
    gpus: tuple[int, ...]
    cores: tuple[int, int]  # [first, end) of the node's cores
    port: int | None = None  # None for ranks
    socket: str | None = None  # of a sandbox on one machine: the path of a unix socket instead of host and port
    ip: str | None = None  # what the other nodes call its node, once the preflight knows; None: the host's name
    interface: str | None = None  # which has that address; None on a run's only node

    @property
    def name(self) -> str:
        """E.g. `server_0`: in messages and names of logs."""
        return f"{self.role}_{self.index}"

    @property
    def reached_at(self) -> str:
        return self.ip or self.host

    @property
    def address(self) -> str:
        return f"unix:{self.socket}" if self.socket else f"http://{self.reached_at}:{self.port}"


@dataclass(frozen=True)  # without slots, for what is computed once
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
        return self._by_role.get(role, [])

    def addresses(self, role: str) -> tuple[str, ...]:
        return self._addresses.get(role, ())

    @cached_property
    def _by_role(self) -> dict[str, list[Process]]:
        found: dict[str, list[Process]] = defaultdict(list)
        for process in self.processes:
            found[process.role].append(process)
        return dict(found)

    @cached_property
    def _addresses(self) -> dict[str, tuple[str, ...]]:
        return {role: tuple(process.address for process in members) for role, members in self._by_role.items()}

    @cached_property
    def beside_servers(self) -> tuple[tuple[int, ...], ...]:
        """For each server the trainer's ranks that share its GPUs, one for each of its own ranks; on a CPU those of its node in
        turn. Empty when a server has a GPU, or stands on a node, without a rank."""
        on = {(rank.node, gpu): rank.index for rank in reversed(self.of("rank")) for gpu in rank.gpus}
        by_node: dict[int, list[int]] = defaultdict(list)
        for rank in self.of("rank"):
            by_node[rank.node].append(rank.index)
        found = []
        for server in self.of("server"):
            if self.gpu == "cpu":
                ranks = by_node.get(server.node) or [-1]
                width = len(server.gpus)
                found.append(tuple(ranks[(server.local * width + k) % len(ranks)] for k in range(width)))
            else:
                found.append(tuple(on.get((server.node, gpu), -1) for gpu in server.gpus))
        return () if any(-1 in ranks for ranks in found) else tuple(found)

    @cached_property
    def owners(self) -> str:
        """`beside_servers` as text: ranks of a server with commas, servers with semicolons."""
        return ";".join(",".join(map(str, ranks)) for ranks in self.beside_servers)

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
    trains: bool = True,
) -> tuple[Placement | None, list[str]]:
    """The placement and no complaints, or None and every reason why there is none.

    nodes, gpus: the allocation; hosts: their names (n0, n1, ... when not known yet); cores: per node, 0 takes the table's;
    trains: False leaves every GPU to the servers, beside one collecting program that needs none.
    """
    cluster = config.cluster
    if nodes < 1 or gpus < 1:
        return None, [f"--nodes {nodes} --gpus {gpus}: both must be at least 1"]
    hosts = hosts or tuple(f"n{i}" for i in range(nodes))
    if len(hosts) != nodes:
        return None, [f"--hosts names {len(hosts)} nodes, --nodes says {nodes}"]
    shared = cluster.placement == "colocated" or cluster.server_nodes > 0  # all GPUs of a node that serves
    train_gpus = gpus - cluster.server_gpus_per_node
    serve_gpus = gpus if shared or not trains else cluster.server_gpus_per_node
    shape = _Shape(
        hosts=hosts,
        gpus=gpus,
        cores=cores or gpus * GPUS[gpu].cores,
        num_rank_nodes=nodes - cluster.server_nodes if trains else 1,
        num_server_nodes=cluster.server_nodes if trains and cluster.server_nodes else nodes,
        train_gpus=train_gpus if trains else 0,
        serve_gpus=serve_gpus,
        ranks=(cluster.ranks_per_node or max(1, train_gpus)) if trains else 1,
        servers=max(1, cluster.servers_per_node or serve_gpus // config.serving.tensor),
        tensor=config.serving.tensor,
        sandbox_cores=cluster.sandbox_cores,
    )
    if problems := [*(_training_problems(config, nodes, shape, gpu) if trains else ()), *_serving_problems(shape, gpu)]:
        return None, problems
    absent = _not_started(config)
    found = Placement(
        hosts=hosts,
        gpus_per_node=gpus,
        cores_per_node=shape.cores,
        gpu=gpu,
        colocated=cluster.placement == "colocated",
        ranks_per_node=shape.ranks,
        servers_per_node=0 if "server" in absent else shape.servers,
        num_rank_nodes=shape.num_rank_nodes,
        num_server_nodes=shape.num_server_nodes,
        master_port=base_port + MASTER_OFFSET,
        processes=tuple(process for process in _processes(shape, base_port) if process.role not in absent),
    )
    if trains and (problems := list(_transport_problems(config, found))):
        return None, problems
    return found, []


def weight_transport(config: Config, placement: Placement) -> str:
    """The transport of this run's weights: what `serving.transport` says, or for `auto` what fits the placement."""
    serving = config.serving
    if serving.transport != "auto":
        return serving.transport
    if placement.colocated and not serving.urls and placement.beside_servers:
        return "handles"
    on_disk = serving.disk_dir is not None and serving.weight_dtype != "fp8_block"
    return "disk" if on_disk and (serving.urls or placement.colocated) else "broadcast"


def takes_turns(config: Config, placement: Placement) -> bool:
    """Whether ranks and servers of this run hold the memory of their GPUs in turns, as `cluster.turns` says."""
    if not placement.num_servers or not any(rank.gpus for rank in placement.of("rank")):
        return False  # nobody serves, or nobody trains
    automatic = placement.colocated and placement.gpu != "cpu" and config.rollout.max_staleness == 0
    return automatic if config.cluster.turns == "auto" else config.cluster.turns == "always"


def _transport_problems(config: Config, placement: Placement) -> Iterator[str]:
    """Why weights cannot travel to these servers as they are to."""
    serving, on_gpu = config.serving, placement.gpu != "cpu"
    chosen = weight_transport(config, placement)
    if chosen == "handles" and not placement.colocated:
        yield "serving.transport = handles needs cluster.placement = colocated; take broadcast or disk"
    elif chosen == "handles" and on_gpu and serving.urls:
        yield "serving.transport = handles needs to know the GPUs of serving.urls, which it cannot; take broadcast or disk"
    elif chosen == "handles" and on_gpu and placement.num_servers and not placement.beside_servers:
        yield (
            "serving.transport = handles needs a trainer rank on every serving GPU; raise cluster.ranks_per_node or take disk"
        )
    elif chosen == "broadcast" and on_gpu and placement.colocated and placement.num_servers and not serving.urls:
        yield (
            f"serving.transport = {serving.transport}: a broadcast over NCCL cannot reach servers on the trainer's GPUs "
            f"(cluster.placement = colocated); take handles with a rank on every serving GPU, or disk with serving.disk_dir"
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    hosts: tuple[str, ...]
    gpus: int  # of a node, as are all the following counts
    cores: int
    num_rank_nodes: int
    num_server_nodes: int
    train_gpus: int
    serve_gpus: int
    ranks: int
    servers: int
    tensor: int
    sandbox_cores: int


def _training_problems(config: Config, nodes: int, shape: _Shape, gpu: str) -> Iterator[str]:
    cluster = config.cluster
    if shape.num_rank_nodes < 1:
        yield (
            f"cluster.server_nodes = {cluster.server_nodes} leaves no node of {nodes} for training; take at most {nodes - 1}"
        )
    if shape.train_gpus < 1:
        yield f"cluster.server_gpus_per_node = {cluster.server_gpus_per_node} leaves none of {shape.gpus} GPUs for training"
    if shape.ranks > shape.train_gpus and gpu != "cpu":
        yield f"cluster.ranks_per_node = {shape.ranks} is more than the {shape.train_gpus} training GPUs of a node"


def _serving_problems(shape: _Shape, gpu: str) -> Iterator[str]:
    fitting = shape.serve_gpus // shape.tensor
    if fitting < 1 and gpu != "cpu":
        yield f"serving.tensor = {shape.tensor} is more than the {shape.serve_gpus} serving GPUs of a node; take at most that"
    elif shape.servers > fitting and gpu != "cpu":
        yield (
            f"cluster.servers_per_node = {shape.servers} of serving.tensor = {shape.tensor} need "
            f"{shape.servers * shape.tensor} GPUs, {shape.serve_gpus} of a node serve; take at most {fitting}"
        )


def _not_started(config: Config) -> set[str]:
    """Roles that this run needs no process for: it samples nothing, or is given services that run already."""
    if config.rollout.replay is not None or config.pretrain is not None:
        return {"server", "sandbox"}
    return {role for role, given in (("server", config.serving.urls), ("sandbox", config.sandbox.address)) if given}


def _processes(shape: _Shape, base_port: int) -> Iterator[Process]:
    first_server_node = len(shape.hosts) - shape.num_server_nodes
    first_gpu = shape.gpus - shape.serve_gpus
    pool = min(shape.sandbox_cores, max(1, shape.cores // 4))
    for node, host in enumerate(shape.hosts):
        ranks = shape.ranks if node < shape.num_rank_nodes else 0
        servers = shape.servers if node >= first_server_node else 0
        cut = blocks(shape.cores - pool, ranks + servers)
        for local in range(ranks):
            yield Process(
                role="rank", index=node * shape.ranks + local, node=node, host=host, local=local,
                gpus=(local % shape.train_gpus,) if shape.train_gpus else (), cores=cut[local],
            )  # fmt: skip
        for local in range(servers):
            index = (node - first_server_node) * shape.servers + local
            gpus = tuple(first_gpu + (local * shape.tensor + k) % shape.serve_gpus for k in range(shape.tensor))
            yield Process(
                role="server", index=index, node=node, host=host, local=local, gpus=gpus, cores=cut[ranks + local],
                port=base_port + SERVER_OFFSET + SERVER_STRIDE * (index % SERVER_SLOTS),
            )  # fmt: skip
        yield Process(
            role="sandbox", index=node, node=node, host=host, local=0, gpus=(), cores=(shape.cores - pool, shape.cores),
            port=base_port + SANDBOX_OFFSET + node % SANDBOX_SLOTS,
        )  # fmt: skip


def blocks(cores: int, count: int) -> list[tuple[int, int]]:
    """[0, cores) cut into `count` contiguous blocks, as even as they come; at least one core each."""
    edges = [round(i * cores / max(1, count)) for i in range(count + 1)]
    return [(min(a, max(0, cores - 1)), max(b, a + 1)) for a, b in itertools.pairwise(edges)]
