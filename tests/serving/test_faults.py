"""Two real servers, one of which dies: nothing is lost, nothing stale is used, and it comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch
from live_server import LiveServer
from reference import Reference, random_weights
from tiny_model import VOCAB_SIZE

from torl_mega.config import Config
from torl_mega.errors import ServerLost
from torl_mega.process.start import free_port, start
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.serving.sync.weights import make_weight_sink
from torl_mega.types import FinishReason, Generation, GenerationRequest

PROMPT = (48, 25, 220, 16, 10, 17)
Weights = dict[str, torch.Tensor]


def length(number: int) -> int:
    """Tokens of an answer: of each another number, so that most are under way when the first has ended."""
    return 40 + 15 * number


def ask(number: int, max_new_tokens: int = 400) -> GenerationRequest:
    return GenerationRequest((*PROMPT, number % 200), max_new_tokens, 1.0, 1.0, (), number, str(number))


def sglang_of(server: LiveServer) -> psutil.Process:
    """SGLang's HTTP process below the side-car."""
    tree = psutil.Process(server.sidecar.pid).children(recursive=True)
    return next(p for p in tree if "sglang.launch_server" in " ".join(p.cmdline()) and "reaper" not in str(p.cmdline()))


def scheduler_of(server: LiveServer) -> psutil.Process:
    tree = psutil.Process(server.sidecar.pid).children(recursive=True)
    return next(p for p in tree if p.name() == "sglang::scheduler")


def restarted(server: LiveServer, old: psutil.Process) -> None:
    """Returns when another process answers on the same URL."""
    psutil.wait_procs([old], timeout=20)
    asyncio.run(wait_ready(server.url, 240, process=server.sidecar, log_path=server.log))


def check(reference: Reference, weights: Weights, generations: list[Generation], version: int) -> None:
    reference.load(weights)
    for number, g in enumerate(generations):
        assert g.finish is FinishReason.EOS or len(g.token_ids) == length(number)
        assert set(g.policy_versions) == {version}
        assert reference.max_gap((*PROMPT, number % 200), g) < 1e-4


@pytest.mark.timeout(900)
def test_a_server_dies_while_it_generates(
    two_servers: tuple[LiveServer, LiveServer], tiny_config: Config, reference: Reference
) -> None:
    steady, victim = two_servers
    urls = [steady.url, victim.url]
    sink = make_weight_sink(tiny_config.serving, urls)
    first = random_weights(reference.original(), 71)
    assert sink.update(iter(first.items()), version=71)["num_servers"] == 2
    old = sglang_of(victim)

    async def generate(expected: int, kill: bool) -> tuple[list[Generation], Any]:
        async with SGLangClient(urls, tiny_config.serving, vocab_size=VOCAB_SIZE) as client:
            client.expect_version(expected)
            tasks = [asyncio.ensure_future(client.generate(ask(n, length(n)))) for n in range(24)]
            if kill:
                while not any(task.done() for task in tasks):  # both are at work
                    await asyncio.sleep(0.02)
                old.send_signal(signal.SIGKILL)
            return await asyncio.gather(*tasks), client.counters

    generations, counters = asyncio.run(generate(71, kill=True))
    check(reference, first, generations, 71)
    assert counters["server_down"] >= 1
    assert steady.version() == "71" != victim.version()

    second = random_weights(reference.original(), 72)
    stats = sink.update(iter(second.items()), version=72)  # while it is down: without it
    assert (stats["num_servers"], stats["num_servers_down"]) == (1, 1)

    restarted(victim, old)
    generations, counters = asyncio.run(generate(72, kill=False))
    check(reference, second, generations, 72)
    assert counters["wrong_version"] >= 1  # it was asked once, and what it sampled was thrown away
    assert not counters["server_rejoined"]
    assert steady.version() == "72" != victim.version()

    third = random_weights(reference.original(), 73)
    assert sink.update(iter(third.items()), version=73)["num_servers"] == 2
    generations, counters = asyncio.run(generate(73, kill=False))
    check(reference, third, generations, 73)
    assert not counters
    assert steady.version() == "73" == victim.version()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_router_may_choose_the_server(
    two_servers: tuple[LiveServer, LiveServer], tiny_config: Config, reference: Reference, tmp_path: Path
) -> None:
    urls, port = [server.url for server in two_servers], free_port()
    weights = random_weights(reference.original(), 75)
    make_weight_sink(tiny_config.serving, urls).update(iter(weights.items()), version=75)
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", *urls, "--policy", "round_robin", "--prometheus-port", str(free_port())]
    router, log = f"http://127.0.0.1:{port}", tmp_path / "router.log"
    config = tiny_config.serving.model_copy(update={"urls": tuple(urls), "router": router})

    async def generate() -> tuple[list[Generation], Any]:
        while not await _ok(f"{router}/readiness"):
            await asyncio.sleep(0.2)
        async with SGLangClient(urls, config, vocab_size=VOCAB_SIZE) as client:
            client.expect_version(75)
            generations = await asyncio.gather(*(client.generate(ask(n)) for n in range(24)))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate(ask(99, 400)), 0.05)  # cancelled: both servers are told
            return generations, client.counters

    with start(command, name="router", log_path=log):
        generations, counters = asyncio.run(generate())
    check(reference, weights, generations, 75)
    assert not counters


async def _ok(url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError, OSError):
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status == 200
    return False


class KillAt:
    """Tensors that kill a server when the stream is half-way through."""

    def __init__(self, weights: Weights, victim: psutil.Process) -> None:
        self._weights, self._victim = weights, victim

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(self._weights.items()):
            if number == len(self._weights) // 2:
                self._victim.kill()
            yield item


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transport", ["broadcast", "handles"])
def test_a_server_dies_in_the_middle_of_a_sync(
    two_servers: tuple[LiveServer, LiveServer], tiny_config: Config, reference: Reference, transport: str
) -> None:
    steady, victim = two_servers
    config = tiny_config.serving.model_copy(update={"transport": transport})
    sink = make_weight_sink(config, [steady.url, victim.url])
    weights = random_weights(reference.original(), 81)
    sink.update(iter(weights.items()), version=81)
    sink.bucket_bytes = 50_000  # type: ignore[attr-defined]
    old = sglang_of(victim)
    with pytest.raises(ServerLost, match=victim.url):
        sink.update(iter(KillAt(weights, old)), version=82)
    stats = sink.update(iter(weights.items()), version=82)
    assert (stats["num_servers"], stats["num_servers_down"]) == (1, 1)
    restarted(victim, old)
    assert sink.update(iter(weights.items()), version=83)["num_servers"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_scheduler_hangs_while_it_generates(
    two_servers: tuple[LiveServer, LiveServer], tiny_config: Config, reference: Reference
) -> None:
    steady, victim = two_servers
    config = tiny_config.serving.model_copy(update={"hang_timeout_s": 3.0})
    weights = random_weights(reference.original(), 91)
    make_weight_sink(config, [steady.url, victim.url]).update(iter(weights.items()), version=91)

    async def generate() -> tuple[list[Generation], Any]:
        async with SGLangClient([steady.url, victim.url], config, vocab_size=VOCAB_SIZE) as client:
            client.expect_version(91)
            tasks = [asyncio.ensure_future(client.generate(ask(n, length(n)))) for n in range(24)]
            while not any(task.done() for task in tasks):
                await asyncio.sleep(0.02)
            frozen = scheduler_of(victim)
            os.kill(frozen.pid, signal.SIGSTOP)
            try:
                return await asyncio.gather(*tasks), client.counters
            finally:
                os.kill(frozen.pid, signal.SIGCONT)

    generations, counters = asyncio.run(generate())
    check(reference, weights, generations, 91)
    assert counters["hang"] >= 1
