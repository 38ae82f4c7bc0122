"""Measures the sandbox beside `python -c` per snippet, bubblewrap and SandboxFusion, in one run on one machine.

    python tools/bench_sandbox.py [--fusion-url URL] [--out docs/img/sandbox_bench.png] [--json FILE] [--quick]
    python tools/bench_sandbox.py --calls      what a call through the service costs client and pool, beside the snippet

Closed-loop load: C callers, each with one snippet in flight. A wrong answer counts as such and fails the run. CPU time
is read from the children's resource usage, which disturbs less than wall time on a shared machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torl_mega.config import SandboxConfig
from torl_mega.sandbox.client import SandboxClient
from torl_mega.sandbox.pool import SandboxPool
from torl_mega.types import ExecutionRequest

SNIPPETS = {
    "print": ("print(1 + 1)", "2\n"),
    "sympy": ("from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))", "[2, 3]\n"),
}
Call = Callable[[str], Awaitable[str]]  # a program to its standard output


async def _process(argv: list[str]) -> str:
    env = {"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, stdin=null, stdout=pipe, stderr=null, env=env)
    return (await process.communicate())[0].decode()


def _bwrap(code: str) -> list[str]:
    flags = (
        "--unshare-all --die-with-parent --new-session --cap-drop ALL --clearenv --dev /dev --tmpfs /tmp --chdir /tmp"
    )
    argv = ["bwrap", *flags.split(), "--setenv", "OPENBLAS_NUM_THREADS", "1"]
    for path in ("/usr", "/lib", "/lib64", "/bin", sys.prefix, sys.base_prefix):  # after /tmp, where a clone may lie
        if os.path.exists(path):
            argv += ["--ro-bind", path, path]
    return [*argv, sys.executable, "-c", code]


async def load(call: Call, name: str, concurrency: int, count: int) -> dict[str, Any]:
    """`count` snippets from `concurrency` callers."""
    code, expected = SNIPPETS[name]
    times: list[float] = []
    wrong = 0
    left = iter(range(count))

    async def caller() -> None:
        nonlocal wrong
        for _ in left:
            begin = time.perf_counter()
            answer = await call(code)
            times.append(time.perf_counter() - begin)
            wrong += answer != expected

    begin = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    total = time.perf_counter() - begin
    times.sort()
    return {
        "snippet": name, "concurrency": concurrency, "count": count, "wrong": wrong, "per_s": count / total,
        "p50_ms": 1e3 * statistics.median(times), "p99_ms": 1e3 * times[min(count - 1, int(0.99 * count))],
    }  # fmt: skip


async def _pool_rows(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for tier in ("A", "B"):
        async with SandboxPool(SandboxConfig(tier=tier, data_libraries=False)) as pool:  # type: ignore[arg-type]
            cpu: list[float] = []

            async def in_pool(code: str, pool: SandboxPool = pool, cpu: list[float] = cpu) -> str:
                result = await pool.run(ExecutionRequest(code, wall_s=60, cpu_s=60))
                cpu.append(result.cpu_s)
                return result.stdout

            for name in SNIPPETS:
                await load(in_pool, name, 2, 20)
                for concurrency, count in ((1, 50), (2, 100), (16, 400), (256, 800)):
                    cpu.clear()
                    row = await load(in_pool, name, concurrency, count // 4 if quick else count)
                    rows.append({"design": f"torl tier {tier}", **row, "cpu_ms": 1e3 * statistics.mean(cpu)})
            if tier == "A":
                rows.append(await _burst(pool, 256 if quick else 2048))
                rows.append(await _memory(pool))
    return rows


async def _burst(pool: SandboxPool, count: int) -> dict[str, Any]:
    code, expected = SNIPPETS["sympy"]
    begin = time.perf_counter()
    results = await asyncio.gather(*(pool.run(ExecutionRequest(code, wall_s=10, cpu_s=10)) for _ in range(count)))
    total = time.perf_counter() - begin
    wrong = sum(r.stdout != expected for r in results)
    return {
        "design": "torl tier A",
        "snippet": "sympy burst",
        "concurrency": count,
        "count": count,
        "wrong": wrong,
        "per_s": count / total,
        "total_s": total,
    }


async def _memory(pool: SandboxPool) -> dict[str, Any]:
    """Private memory (not shared with the zygote or anybody) of sympy snippets that all run at once."""
    before = set(_private_kb())
    hold = "from sympy import *\nx = symbols('x')\nsolve(x**2 - 5*x + 6, x)\nimport time\ntime.sleep(6)"
    assert pool.setup is not None
    count = pool.setup.max_running
    calls = [asyncio.create_task(pool.run(ExecutionRequest(hold, wall_s=60))) for _ in range(count)]
    await asyncio.sleep(4.0)
    held = [kb for pid, kb in _private_kb().items() if pid not in before]
    await asyncio.gather(*calls)
    mb = statistics.mean(held) / 1024
    return {
        "design": "torl tier A",
        "snippet": "memory",
        "concurrency": count,
        "count": len(held),
        "wrong": 0,
        "mb_per_running": mb,
    }


def _private_kb() -> dict[int, int]:
    """pid -> private memory of each of this process' descendants."""
    import psutil

    out = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
            out[child.pid] = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return out


async def _other_rows(fusion_url: str | None, quick: bool) -> list[dict[str, Any]]:
    designs: dict[str, Call] = {"python -c": lambda code: _process([sys.executable, "-c", code])}
    if shutil.which("bwrap"):
        designs["bubblewrap"] = lambda code: _process(_bwrap(code))
    rows = []
    for design, call in designs.items():  # pyright: ignore[reportAssignmentType]
        for name in SNIPPETS:
            for concurrency, count in ((1, 12), (2, 24), (16, 48)):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                row = await load(call, name, concurrency, count // 4 if quick else count)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                rows.append(
                    {"design": design, **row, "cpu_ms": 1e3 * cpu / row["count"] if design != "bubblewrap" else None}
                )
    if fusion_url:
        async with SandboxClient([fusion_url]) as client:
            for name in SNIPPETS:
                for concurrency, count in ((1, 12), (2, 24), (16, 48)):

                    async def call(code: str) -> str:
                        return (await client.run(ExecutionRequest(code, wall_s=60))).stdout

                    rows.append(
                        {"design": "SandboxFusion", **await load(call, name, concurrency, count), "cpu_ms": None}
                    )
    return rows


async def _calls() -> None:
    """Prints CPU time of this process and of the pool's own process per call, and the call's duration."""
    import psutil

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torl_mega.sandbox.serve", "--socket", f"{folder}/s", "--port", "0"]
        process = subprocess.Popen(
            [*command, "--settings", '{"data_libraries": false}'], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        addresses = process.stdout.readline().split("address=")[1].strip().split(",")
        both = [psutil.Process(), psutil.Process(process.pid)]
        print("| address | callers | client CPU ms | pool CPU ms | p50 ms |\n|---|---|---|---|---|")
        for address in addresses:
            async with SandboxClient([address]) as client:

                async def call(code: str, client: SandboxClient = client) -> str:
                    return (await client.run(ExecutionRequest(code, wall_s=60, cpu_s=60))).stdout

                for concurrency, count in ((1, 400), (16, 1000)):
                    await load(call, "print", concurrency, 50)
                    before = [sum(p.cpu_times()[:2]) for p in both]
                    row = await load(call, "print", concurrency, count)
                    cpu = [1e3 * (sum(p.cpu_times()[:2]) - b) / count for p, b in zip(both, before, strict=True)]
                    print(
                        f"| {address.split(':')[0]} | {concurrency} | {cpu[0]:.2f} | {cpu[1]:.2f} | {row['p50_ms']:.1f} |"
                    )
        process.terminate()
        process.wait()
        process.stdout.close()


def table(rows: list[dict[str, Any]]) -> str:
    out = [
        "| design | snippet | callers | p50 ms | p99 ms | snippets/s | CPU ms each | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "p50_ms" in row:
            cpu = f"{row['cpu_ms']:.1f}" if row.get("cpu_ms") else "–"
            cells = [
                row["design"],
                row["snippet"],
                row["concurrency"],
                f"{row['p50_ms']:.1f}",
                f"{row['p99_ms']:.1f}",
                f"{row['per_s']:.1f}",
                cpu,
                row["wrong"],
            ]
            out.append("| " + " | ".join(map(str, cells)) + " |")
    for row in rows:
        if "total_s" in row:
            out.append(
                f"\nBurst of {row['count']} sympy snippets at once, limit 10 s each: {row['total_s']:.1f} s, "
                f"{row['wrong']} wrong or timed out."
            )
        if "mb_per_running" in row:
            out.append(
                f"\nMemory of one running sympy snippet: {row['mb_per_running']:.1f} MB ({row['count']} at once)."
            )
    return "\n".join(out)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, (key, label) in zip(
        axes, (("per_s", "snippets per second"), ("p50_ms", "median latency, ms")), strict=True
    ):
        for design in dict.fromkeys(row["design"] for row in rows):
            points = [
                (r["concurrency"], r[key])
                for r in rows
                if r["design"] == design and r["snippet"] == "sympy" and key in r
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=design)
        axis.set(xscale="log", yscale="log", xlabel="callers at once", ylabel=label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"sympy snippet, {len(os.sched_getaffinity(0))} cores", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


async def _all(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [*await _pool_rows(args.quick), *await _other_rows(args.fusion_url, args.quick)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusion-url", help="a running SandboxFusion to measure too")
    parser.add_argument("--out", type=Path, help="where to write the plot")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--calls", action="store_true", help="only the cost of a call through the service")
    parser.add_argument("--quick", action="store_true", help="a quarter of the snippets")
    args = parser.parse_args()
    if args.calls:
        uvloop.run(_calls())  # as the trainer's client runs
        return 0
    load_before = os.getloadavg()[0]
    rows = asyncio.run(_all(args))
    print(table(rows))
    print(f"\n{len(os.sched_getaffinity(0))} cores, load average {load_before:.1f} before the run.")
    if args.out:
        plot(rows, args.out)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
