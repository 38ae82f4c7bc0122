"""What tool calls cost a rollout: our collector beside a batch-barrier loop, on the same server in one run.

    python tools/bench_rollout.py                 # real SGLang; table, and docs/img/rollout.png with --png
    python tools/bench_rollout.py --client        # a protocol stand-in instead: what the client side alone can drive

Both loops sample the same number of tokens per trajectory at every C (end-of-text is ignored, turns have fixed lengths)
and meet the same tool latencies: log-normal with median 50 ms, and 2 % at the 5 s limit. The barrier loop is the shape of
the released ToRL code: all generations of a turn, then all its tool calls (64 at once), then the next turn.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
import numpy as np
from aiohttp import web

from torl_mega.config_file import load_config
from torl_mega.process.start import free_port, start
from torl_mega.rollout.build import GC_THRESHOLDS, AsyncRunner
from torl_mega.rollout.episode import Episode, EpisodeSettings
from torl_mega.rollout.python_tool import Limits, PythonTool
from torl_mega.rollout.scheduler import EpisodeScheduler
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.types import (
    ExecutionRequest,
    ExecutionResult,
    ExecutionStatus,
    FinishReason,
    Generation,
    GenerationRequest,
    GraderStatus,
    Problem,
    Prompt,
    Reward,
    Trajectory,
)

CALL = "```python\nprint(1)\n```\n```output"
LIMIT_S, SLOW_SHARE, MEDIAN_S, SIGMA = 5.0, 0.02, 0.05, 1.0
BARRIER_CALLS = 64
ROUNDS = 4  # requests per trajectory slot, so that connections are reused as between turns
PROMPT_IDS = (48, 25, 220, 16, 10, 17)


class TimedSandbox:
    """Takes as long as its seed says; runs nothing."""

    def __init__(self, seed: int, limit: int | None = None) -> None:
        self._rng = np.random.default_rng(seed)
        self._slots = asyncio.Semaphore(limit) if limit else None

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        slow = self._rng.random() < SLOW_SHARE
        wall_s = LIMIT_S if slow else min(LIMIT_S, MEDIAN_S * float(np.exp(SIGMA * self._rng.normal())))
        if self._slots is None:
            await asyncio.sleep(wall_s)
        else:
            async with self._slots:
                await asyncio.sleep(wall_s)
        return ExecutionResult(ExecutionStatus.OK, 0, "1\n", "", wall_s, 0.0, 0.0)


@dataclass
class FixedLength:
    """A Generator that samples exactly tokens / (C + 1) tokens a turn from a real server."""

    session: aiohttp.ClientSession
    url: str
    tokens_per_turn: int
    num_tokens: int = field(default=0)

    async def generate(self, request: GenerationRequest) -> Generation:
        sampling = {"temperature": 1.0, "max_new_tokens": self.tokens_per_turn, "ignore_eos": True}
        body = {"input_ids": list(request.token_ids), "sampling_params": sampling, "return_logprob": True}
        async with self.session.post(f"{self.url}/generate", json=body) as answer:
            tree = await answer.json()
        ids = tuple(tree["output_ids"])
        self.num_tokens += len(ids)
        logprobs = tuple(x[0] for x in tree["meta_info"]["output_token_logprobs"])
        finish = FinishReason.STOP_STRING if request.stop else FinishReason.EOS
        return Generation(ids, logprobs, (0,) * len(ids), CALL, finish)


class NoReward:
    async def score(self, trajectory: Trajectory) -> Reward:
        return Reward(0.0, False, GraderStatus.OK, None, {})


def prompts(count: int) -> list[Prompt]:
    return [Prompt(Problem(f"bench/{i}", "", "", "bench"), PROMPT_IDS) for i in range(count)]


def tool(seed: int) -> PythonTool:
    return PythonTool(TimedSandbox(seed), Limits(LIMIT_S, LIMIT_S, memory_mb=512, output_bytes=65536))


def encode(text: str) -> tuple[int, ...]:
    return tuple(b % 200 for b in text.encode())


async def free(url: str, count: int, tokens: int, calls: int, seed: int) -> tuple[float, int]:
    """Our collector: (wall seconds, tokens sampled)."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2)) as session:
        generator = FixedLength(session, url, tokens // (calls + 1))
        episode = Episode(generator, tool(seed), encode, EpisodeSettings(1.0, 1.0, 4096, calls))
        scheduler = EpisodeScheduler(NoReward(), asyncio.run, 4096, 600.0)
        collected = await scheduler.collect_async(episode, prompts(count), 1, seed)
        assert not collected.faults, collected.faults
        return collected.wall_s, generator.num_tokens


async def barrier(url: str, count: int, tokens: int, calls: int, seed: int) -> tuple[float, int]:
    """The released code's shape: every stage waits for its slowest member."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2)) as session:
        generator, sandbox = FixedLength(session, url, tokens // (calls + 1)), TimedSandbox(seed, BARRIER_CALLS)
        begun, texts = time.monotonic(), [PROMPT_IDS] * count
        for turn in range(calls + 1):
            requests = [GenerationRequest(t, 4096, 1.0, 1.0, ("x",) if turn < calls else (), 0, "r") for t in texts]
            answers = await asyncio.gather(*(generator.generate(r) for r in requests))
            texts = [(*t, *a.token_ids) for t, a in zip(texts, answers, strict=True)]
            if turn < calls:
                await asyncio.gather(*(sandbox.run(ExecutionRequest(CALL)) for _ in texts))
                texts = [(*t, *encode("\n1\n```\n")) for t in texts]
        return time.monotonic() - begun, generator.num_tokens


@contextmanager
def server() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "torl_mega.serving.serve", "conf/quickstart.yaml", "--port", str(port)]
    with tempfile.TemporaryDirectory() as logs:
        with start(command, name="server", log_path=Path(logs) / "serve.log"):
            url = f"http://127.0.0.1:{port}"
            asyncio.run(wait_ready(url, 600))
            yield url


def against_barrier(count: int, tokens: int, repeats: int, png: Path | None) -> None:
    walls: dict[tuple[str, int], list[float]] = {}
    with server() as url:
        asyncio.run(free(url, count, tokens, 0, 0))  # warm
        for seed in range(repeats):  # interleaved, so that a noisy moment hits both
            for calls in (0, 1, 2):
                for name, loop in (("collector", free), ("barrier", barrier)):
                    wall, sampled = asyncio.run(loop(url, count, tokens, calls, seed))
                    assert sampled == count * (tokens // (calls + 1)) * (calls + 1)
                    walls.setdefault((name, calls), []).append(wall)
    median = {key: float(np.median(values)) for key, values in walls.items()}
    print(f"{count} trajectories x {tokens} sampled tokens, median of {repeats}")
    print("| loop | C=0 | C=1 | C=2 | C=1 / C=0 | C=2 / C=0 |\n|---|---|---|---|---|---|")
    for name in ("collector", "barrier"):
        w = [median[name, c] for c in (0, 1, 2)]
        print(f"| {name} | {w[0]:.1f} s | {w[1]:.1f} s | {w[2]:.1f} s | {w[1] / w[0]:.2f}x | {w[2] / w[0]:.2f}x |")
    if png:
        plot(median, png)


def plot(median: dict[tuple[str, int], float], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name, shift in (("collector", -0.2), ("barrier", 0.2)):
        ratios = [median[name, c] / median[name, 0] for c in (0, 1, 2)]
        axes.bar([c + shift for c in (0, 1, 2)], ratios, 0.4, label=name)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xticks=[0, 1, 2], xticklabels=["C=0", "C=1", "C=2"], ylabel="wall time relative to C=0")
    axes.legend()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120, bbox_inches="tight")


# ------------------------------------------------------------------------------------------------ the client alone


def stand_in(pipe: Connection, tokens: int) -> None:
    """Answers /generate at once with a fixed body, as one compiled JSON."""
    triples = [[-0.5, 16, None]] * tokens
    meta = {
        "finish_reason": {"type": "length", "length": tokens},
        "output_token_logprobs": triples,
        "weight_version": "0",
        "weight_versions": [{"version": "0", "start": 0, "end": tokens}],
        "completion_tokens": tokens,
    }
    body = json.dumps({"text": "1" * tokens, "output_ids": [16] * tokens, "meta_info": meta}).encode()

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    async def info(_: web.Request) -> web.Response:
        return web.json_response({"weight_version": "0", "startup_time": 0, "tp_size": 1})

    async def main() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/generate", generate)
        for path in ("/ready", "/model_info", "/server_info"):
            app.router.add_get(path, info)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)  # as uvicorn, which SGLang runs on
        await site.start()
        pipe.send(runner.addresses[0][1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    asyncio.run(main())


async def drive(url: str, trajectories: int, tokens: int) -> None:
    config = load_config("conf/quickstart.yaml")
    async with SGLangClient([url], config.serving, vocab_size=1000) as client:
        client.expect_version(0)
        episode = Episode(client, tool(0), encode, EpisodeSettings(1.0, 1.0, tokens, 0))
        scheduler = EpisodeScheduler(NoReward(), asyncio.run, trajectories, 600.0)
        for round_number in range(ROUNDS):
            collected = await scheduler.collect_async(episode, prompts(trajectories // 16), 16, round_number)
            assert sum(len(g.trajectories) for g in collected.groups) == trajectories, collected.faults


def client_alone(trajectories: int, tokens: int) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=stand_in, args=(theirs, tokens))
    child.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}"
        gc.set_threshold(*GC_THRESHOLDS)
        run = AsyncRunner(None)
        before, begun = time.process_time(), time.monotonic()
        run(drive(url, trajectories, tokens))
        cpu, wall = time.process_time() - before, time.monotonic() - begun
    finally:
        ours.send(None)
        child.join()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{trajectories} trajectories at once, {tokens} tokens each: {ROUNDS * trajectories / cpu:.0f} requests/s/core client side"
    )
    print(f"({cpu:.2f} s CPU, {wall:.2f} s wall with the stand-in on the other core), peak memory {rss:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", action="store_true", help="the client alone, against a protocol stand-in")
    parser.add_argument("--trajectories", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=None, help="sampled per trajectory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    if args.client:
        client_alone(args.trajectories or 4096, args.tokens or 64)
    else:
        against_barrier(args.trajectories or 256, args.tokens or 252, args.repeats, args.png)


if __name__ == "__main__":
    main()
