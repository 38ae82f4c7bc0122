"""What rank 0 alone has: the clients of servers, sandbox and graders, the prompts, the log and the weight sink."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop

from torl_mega.config import Config
from torl_mega.data.prompts import PromptSource
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, Preempted
from torl_mega.interfaces import Rollouts, WeightSink
from torl_mega.layout import read_hf_config
from torl_mega.process.stop_flag import StopFlag
from torl_mega.reward.function import AnswerReward
from torl_mega.rollout.ahead import OverlappedRollouts
from torl_mega.rollout.collector import AsyncCollector
from torl_mega.rollout.episode import Episode, EpisodeSettings
from torl_mega.rollout.evaluate import Evaluation
from torl_mega.rollout.replay import NoServers, ReplayRollouts
from torl_mega.rollout.service import RolloutService
from torl_mega.run.folder import RunFolder
from torl_mega.run.metrics import RunMetrics
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.fp8 import BlockSink
from torl_mega.serving.server import wait_ready
from torl_mega.serving.sync.paused import DrainedSink, PausedSink
from torl_mega.serving.sync.weights import make_weight_sink

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank0:
    rollouts: Rollouts
    sink: WeightSink
    log: RunMetrics
    tokenizer: Tokenizer
    server_urls: tuple[str, ...]  # empty when recorded trajectories are replayed
    run: AsyncRunner


GC_THRESHOLDS = (100_000, 50, 100)
"""Thousands of trajectories are a million live objects; Python's own (700, 10, 10) spends half of the client's time on them."""


class AsyncRunner:
    """The event loop that every client of rank 0 belongs to. A stop request cancels what runs on it: `Preempted`."""

    def __init__(self, stop: StopFlag | None) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        gc.set_threshold(*GC_THRESHOLDS)
        self._stop = stop

    def __call__(self, work: Awaitable[T]) -> T:
        loop = self._runner.get_loop()
        task = asyncio.ensure_future(work, loop=loop)
        if self._stop is not None:
            self._stop.on_request = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return loop.run_until_complete(task)
        except asyncio.CancelledError:
            raise Preempted from None
        finally:
            if self._stop is not None:
                self._stop.on_request = None

    def close(self) -> None:
        self._runner.close()


@contextlib.contextmanager
def build_rank0(
    config: Config, folder: RunFolder, saved: Mapping[str, Any], stop: StopFlag, *, device: str
) -> Iterator[Rank0]:
    """Everything of rank 0, closed again on the way out. `device` is where the trainer's tensors are. Raises TorlError
    before anything was sampled."""
    with contextlib.ExitStack() as stack:
        run = AsyncRunner(stop)
        stack.callback(run.close)
        tokenizer = Tokenizer(config.model.path)
        tokenizer.check_lossless()
        log = RunMetrics(
            folder.path,
            num_steps=config.num_steps,
            resume_at=int(saved["steps_done"]),
            tensorboard=config.logging.tensorboard,
        )
        stack.callback(log.close)
        if config.rollout.replay is not None:
            yield Rank0(ReplayRollouts(config), NoServers(), log, tokenizer, (), run)
            return
        urls = addresses("TORL_SERVERS")
        in_flight = config.rollout.max_staleness > 1  # trajectories are under way during a sync
        flush_cache = not (in_flight and config.rollout.pause == "in_place")
        sink = make_weight_sink(config.serving, urls, device=device, flush_cache=flush_cache)
        if config.rollout.max_staleness == 0:
            rollouts: Rollouts = build_rollouts(config, folder, tokenizer, run, stack)
        else:
            rollouts = stack.enter_context(contextlib.closing(OverlappedRollouts(config, folder, stop)))
            pause = config.rollout.pause
            sink = PausedSink(sink, urls, pause) if in_flight else DrainedSink(sink, rollouts.drain)
        if config.serving.weight_dtype == "fp8_block":
            sink = BlockSink(sink)
        if saved["rollouts"] is not None:
            rollouts.restore(saved["rollouts"])
        wait_for_servers(config, run)
        yield Rank0(rollouts, sink, log, tokenizer, urls, run)


def build_rollouts(
    config: Config,
    folder: RunFolder,
    tokenizer: Tokenizer,
    run: AsyncRunner,
    stack: contextlib.ExitStack,
    *,
    any_version: bool = False,
) -> RolloutService:
    """The collecting half alone. `any_version`: no trainer sends weights, the servers hold what they loaded."""
    prompts = PromptSource(config.data, tokenizer.encode, seed=config.seed)  # a wrong data file shows before any wait
    evaluation = Evaluation(
        config.eval, config.data, tokenizer.encode, folder.path / "eval", max_tool_calls=config.rollout.max_tool_calls
    )
    vocab_size = int(read_hf_config(config.model.path)["vocab_size"])  # the model's: it may sample padding ids
    client = SGLangClient(addresses("TORL_SERVERS"), config.serving, vocab_size=vocab_size)
    sandbox = _sandbox(config)
    reward = AnswerReward(config.reward, max_response_tokens=config.rollout.max_response_tokens)
    for part in (client, sandbox, reward):
        run(part.start())
        stack.callback(lambda part=part: run(part.close()))

    def expect(version: int) -> None:
        client.expect_version(version, oldest=max(0, version - config.rollout.max_staleness))

    return RolloutService(
        config=config,
        prompts=prompts,
        episode=Episode(client, sandbox, tokenizer.encode, _episode_settings(config)),
        collector=AsyncCollector(
            reward, run, max_concurrency=config.rollout.max_concurrency, deadline_s=config.rollout.trajectory_deadline_s
        ),
        run_evaluation=evaluation.run,
        trajectories_dir=folder.trajectories,
        expect_version=(lambda _: client.expect_version(None)) if any_version else expect,
        counters=lambda: Counter(client.counters) + Counter(sandbox.counters) + reward.counters,
    )


def wait_for_servers(config: Config, run: AsyncRunner) -> None:
    """Returns when all of them answer. Raises ServerError for the first that does not."""
    for url in addresses("TORL_SERVERS"):
        run(wait_ready(url, config.serving.startup_timeout_s))


def _episode_settings(config: Config) -> EpisodeSettings:
    rollout, sandbox = config.rollout, config.sandbox
    return EpisodeSettings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_response_tokens=rollout.max_response_tokens,
        max_tool_calls=rollout.max_tool_calls,
        wall_s=sandbox.wall_s,
        cpu_s=sandbox.cpu_s,
        memory_mb=sandbox.memory_mb,
        output_bytes=sandbox.output_bytes,
    )


def _sandbox(config: Config) -> Any:
    from torl_mega.sandbox.client import SandboxClient

    return SandboxClient(addresses("TORL_SANDBOX"))


def addresses(variable: str) -> tuple[str, ...]:
    """What the launcher put into the environment."""
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(
            f"{variable} is not set; start the run with `torl train`, or set it to the addresses of the side-cars"
        )
    return tuple(value.split(","))
