"""Which logical CPUs each process of a node gets: whole physical cores, on the NUMA node of its first GPU.

Logical CPUs are usually numbered socket by socket and then once more for the hyper-threads, so that a contiguous block of
them may be the second threads of another process's cores, on the socket where its GPU is not.

Contract: `pin` is pure. Where topology or GPUs are not known it gives None, and the placement's contiguous blocks hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torl_mega.errors import ConfigError
from torl_mega.launch.commands import device_number
from torl_mega.launch.place import nvidia_smi
from torl_mega.planner.placement import Process, blocks


@dataclass(frozen=True, slots=True)
class Topology:
    cores: dict[
        int, list[tuple[int, ...]]
    ]  # by NUMA node: its physical cores, each the logical CPUs of its hyper-threads
    gpus: tuple[int, ...]  # the NUMA node of each GPU


def pin(processes: Sequence[Process], topology: Topology) -> dict[str, set[int]] | None:
    """Logical CPUs by process name, for all processes of one node; None where they cannot each have a core by their GPU.

    The sandbox pool takes NUMA nodes that have no GPU at work, and what it still lacks from the end of all others alike.
    """
    homes = {p.name: topology.gpus[p.gpus[0]] for p in processes if p.gpus and p.gpus[0] < len(topology.gpus)}
    if not homes or any(p.gpus and homes.get(p.name) not in topology.cores for p in processes):
        return None
    for process in processes:
        if not process.gpus and process.role != "sandbox":
            homes[process.name] = min(set(homes.values()), key=list(homes.values()).count)
    busy = {numa: list(cores) for numa, cores in topology.cores.items() if numa in homes.values()}
    idle = [core for numa, cores in topology.cores.items() if numa not in busy for core in cores]
    pinned: dict[str, set[int]] = {}
    for pool in (p for p in processes if p.role == "sandbox"):
        lacks = pool.cores[1] - pool.cores[0] - sum(map(len, idle))
        share = max(0.0, lacks / sum(len(core) for cores in busy.values() for core in cores))
        taken = list(idle)
        for cores in busy.values():
            kept = len(cores) - round(len(cores) * share)
            taken += cores[kept:]
            del cores[kept:]
        pinned[pool.name] = {cpu for core in taken for cpu in core}
    for numa, cores in busy.items():
        names = [name for name, home in homes.items() if home == numa]
        if len(names) > len(cores):
            return None
        for name, (first, end) in zip(names, blocks(len(cores), len(names)), strict=True):
            pinned[name] = {cpu for core in cores[first:end] for cpu in core}
    return pinned


def read_topology(cpus: Sequence[int], sys: Path = Path("/sys")) -> Topology | None:
    """This machine's, of these logical CPUs; None where /sys or nvidia-smi does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError, ConfigError):
        cores: dict[int, list[tuple[int, ...]]] = {}
        for folder in sorted(sys.glob("devices/system/node/node[0-9]*"), key=lambda path: int(path.name[4:])):
            mine = [cpu for cpu in _numbers((folder / "cpulist").read_text()) if cpu in cpus]
            siblings = {cpu: sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in mine}
            threads = {tuple(t for t in _numbers(file.read_text()) if t in cpus) for file in siblings.values()}
            if threads:
                cores[int(folder.name[4:])] = sorted(threads)
        buses = [row[0].lower()[-12:] for row in nvidia_smi("pci.bus_id")]  # 00000000:18:00.0; /sys has four digits
        near = [int((sys / f"bus/pci/devices/{bus}/numa_node").read_text()) for bus in buses]
        return Topology(cores, tuple(near[int(device_number(gpu))] for gpu in range(len(near))))
    return None


def _numbers(text: str) -> list[int]:
    """Of /sys's lists, e.g. `0-3,8`."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]
