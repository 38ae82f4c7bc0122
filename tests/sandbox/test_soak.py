"""An hour's work in minutes: 50,000 snippets, one in twenty hostile. Memory, latency, descriptors and processes stay flat."""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hostile import Hostile, cases
from pools import Pool, descendants, pool

from torl_mega.sandbox.client import SandboxClient
from torl_mega.types import ExecutionRequest as R
from torl_mega.types import ExecutionStatus as S

NUM_SNIPPETS = int(os.environ.get("TORL_SOAK_SNIPPETS", "50000"))
NUM_WINDOWS = 10


@dataclass
class Window:
    """What was seen while one tenth of the snippets ran."""

    p50_s: float  # latency; printed, not judged: it follows whatever else the machine does
    snippet_cpu_s: float  # median CPU time of an ordinary snippet
    own_cpu_s: float  # CPU time of pool and zygotes so far
    rss_mb: float  # pool and zygotes, measured with nothing running; a page that forks share counts in each of them
    pss_mb: float  # the same with shared pages counted once
    num_fds: int
    num_processes: int


def _quick(case: Hostile) -> bool:
    """Programs that do not fill hundreds of megabytes or write to disk: those are the corpus's business. Nor one of 12 MB, of
    which malloc keeps some in the pool for good: the next test's."""
    return "@" not in case.code and not case.name.startswith(
        ("mem_", "disk_", "inode", "zip", "decimal", "deep", "parser", "memory", "huge_program")
    )


async def _window(
    client: SandboxClient, numbers: range, hostile: itertools.cycle[Hostile]
) -> list[tuple[float, float]]:
    """(latency, CPU seconds) of each ordinary snippet."""
    times: list[tuple[float, float]] = []
    queue = iter(numbers)

    async def caller() -> None:
        for n in queue:
            if n % 20 == 0:
                result = await client.run(R(next(hostile).code, wall_s=0.3, cpu_s=0.3))
                assert result.status is not S.INFRA, result.message
                continue
            begin = time.perf_counter()
            result = await client.run(R(f"print({n} * 7)", wall_s=30, cpu_s=30))
            times.append((time.perf_counter() - begin, result.cpu_s))
            assert result.stdout == f"{n * 7}\n", result

    await asyncio.gather(*(caller() for _ in range(6)))
    return times


def _look(served: Pool, times: list[tuple[float, float]]) -> Window:
    tree = [psutil.Process(p) for p in {served.process.pid, *descendants(served.process.pid)}]
    fds = sum(len(os.listdir(f"/proc/{p.pid}/fd")) for p in tree)
    own = sum(sum(p.cpu_times()[:2]) for p in tree)
    p50, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    memory = [p.memory_full_info() for p in tree]
    rss, pss = (sum(getattr(m, kind) for m in memory) / 2**20 for kind in ("rss", "pss"))
    return Window(p50, cpu, own, rss, pss, fds, len(tree))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tier", ["A", "B"])
def test_soak(tier: str) -> None:
    count = NUM_SNIPPETS if tier == "A" else NUM_SNIPPETS // 10
    step = count // NUM_WINDOWS
    hostile = itertools.cycle([c for c in cases() if _quick(c)])

    async def main(served: Pool) -> list[Window]:
        out = []
        for start in (-200, *range(0, count, step)):  # first, everything is used once
            async with SandboxClient([served.address]) as client:
                times = await _window(client, range(start, start + (step if start >= 0 else 200)), hostile)
            await asyncio.sleep(0.5)  # what was killed last is gone, and so are the client's connections
            out.append(_look(served, times))
        return out[1:]

    with pool(tier=tier, data_libraries=False, max_running=4) as served:
        windows = asyncio.run(main(served))
        boxes = [
            b for base in Path("/tmp").glob(f"torl-sandbox-{served.process.pid}-*/zygote-*") for b in base.glob("box-*")
        ]
    for number, window in enumerate(windows):
        times = f"p50 {1e3 * window.p50_s:.1f} ms, CPU {1e3 * window.snippet_cpu_s:.1f} ms"
        memory = f"{window.pss_mb:.0f} MB ({window.rss_mb:.0f} with shared pages in each)"
        print(f"{tier} {number}: {times}, {memory}, {window.num_fds} fds, {window.num_processes} processes")
    # the first third warms up: slots come with their first use. After it nothing may grow; each look catches a child that was
    # forked ahead, a connection being closed, or a program being killed, so the least of three looks is compared: a leak is in all
    third = len(windows) // 3
    first, last = windows[0], windows[-1]
    begin, end = windows[third : 2 * third], windows[-third:]
    assert boxes == []
    for what, allowed in (("num_processes", 0), ("num_fds", 2), ("pss_mb", 10)):
        early, late = (min(getattr(w, what) for w in part) for part in (begin, end))
        assert late <= early + allowed, what
    early, late = (statistics.median(w.snippet_cpu_s for w in part) for part in (begin, end))
    assert late <= 1.5 * early + 0.005
    early, late = windows[third].own_cpu_s - first.own_cpu_s, last.own_cpu_s - windows[-1 - third].own_cpu_s
    assert late <= 1.5 * early + 0.5


@pytest.mark.slow
def test_a_connection_keeps_no_program() -> None:
    """Of programs of 12 MB some stay until the next garbage collection, and some with malloc; no more with more of them."""
    huge = max((c.code for c in cases()), key=len)

    async def main(served: Pool) -> list[float]:
        seen = []
        async with SandboxClient([served.address]) as client:
            for _ in range(3):
                for _ in range(10):
                    await client.run(R(huge, wall_s=0.3, cpu_s=0.3))
                for _ in range(120):
                    await asyncio.gather(*(client.run(R("print(1)#" + "x" * 20_000)) for _ in range(8)))
                seen.append(psutil.Process(served.process.pid).memory_full_info().pss / 2**20)
        return seen

    with pool(tier="A", data_libraries=False, max_running=4) as served:
        seen = asyncio.run(main(served))
    assert max(seen) - seen[0] < 2 * len(huge) / 2**20, seen
