"""Builds the collecting half: prompts, clients of servers and sandbox, graders, episodes. Used by rank 0, by the child that
samples ahead, and by `torl eval` and `torl rollout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

import uvloop

from torl_mega.config import Config
from torl_mega.data.golds import judge_golds, read_golds
from torl_mega.data.prompts import PromptSource
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, Preempted
from torl_mega.layout import describe_model, read_hf_config
from torl_mega.process.stop_flag import StopFlag
from torl_mega.reward.function import make_reward
from torl_mega.rollout.collector import LiveCollector
from torl_mega.rollout.episode import Episode, EpisodeSettings
from torl_mega.rollout.evaluate import load_benchmarks
from torl_mega.rollout.scheduler import EpisodeScheduler
from torl_mega.rollout.tools import tool_and_prompts
from torl_mega.run.folder import RunFolder
from torl_mega.run.progress import Progress
from torl_mega.sandbox.client import SandboxClient
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.sglang_server import wait_ready

T = TypeVar("T")

GC_THRESHOLDS = (100_000, 50, 100)
"""For `gc.set_threshold` in a process that collects: thousands of trajectories are a million live objects, and with Python's
own (700, 10, 10) half of the client's time goes to them."""


class AsyncRunner:
    """The event loop that all clients of a process belong to. Calling it runs a coroutine to its end and returns its result;
    a stop request cancels the coroutine, and the call raises `Preempted`."""

    def __init__(self, stop: StopFlag | None) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
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

    def stops_at(self, stop: StopFlag) -> None:
        """From now on a request of `stop` ends what runs here."""
        self._stop = stop

    def raise_if_stopped(self) -> None:
        """Raises `Preempted` for a request that came while nothing ran here."""
        if self._stop is not None and self._stop.requested:
            raise Preempted

    def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work`, which is not begun once a stop was requested. Raises `Preempted`."""
        if self._stop is not None and self._stop.requested:
            work.close()
            raise Preempted
        return self(work)

    def close(self) -> None:
        self._runner.close()


def build_collector(
    config: Config,
    folder: RunFolder,
    tokenizer: Tokenizer,
    run: AsyncRunner,
    stack: contextlib.ExitStack,
    *,
    any_version: bool = False,
) -> LiveCollector:
    """A collector whose parts are started on `run` and closed by `stack`. `any_version`: no trainer sends weights, the servers
    hold what they loaded. Raises TorlError for data, addresses or services that are not there."""
    sandbox = SandboxClient(addresses("TORL_SANDBOX"))
    tool, encode = tool_and_prompts(config, tokenizer, sandbox)
    prompts = PromptSource(config.data, encode, seed=config.seed)  # a wrong data file shows before any wait
    benchmarks = load_benchmarks(config.eval, config.data, encode)
    shape = describe_model(read_hf_config(config.model.path))
    # the model's vocabulary: it may sample padding ids
    client = SGLangClient(addresses("TORL_SERVERS"), config.serving, vocab_size=shape.vocab, shape=shape)
    reward = make_reward(config.reward, max_response_tokens=config.rollout.max_response_tokens)
    for part in (client, sandbox, reward):
        run(part.start())
        stack.callback(lambda part=part: run(part.close()))

    if config.reward.function is None:
        for spec, problems in prompts.files:
            golds = run(read_golds(problems, reward.is_readable))
            judge_golds(spec, golds, most=config.data.max_unreadable_golds)

    def servers() -> tuple[int, int]:
        return client.num_up, len(addresses("TORL_SERVERS"))

    progress = Progress.from_environment()
    progress.servers = servers

    def expect(version: int) -> None:
        client.expect_version(version, oldest=max(0, version - config.rollout.max_staleness))

    rollout = config.rollout
    return LiveCollector(
        config=config,
        folder=folder,
        prompts=prompts,
        benchmarks=benchmarks,
        episode=Episode(
            client,
            tool,
            tokenizer.encode,
            _episode_settings(config),
        ),
        scheduler=EpisodeScheduler(
            reward,
            run.unless_stopped,
            max_concurrency=rollout.max_concurrency,
            deadline_s=rollout.trajectory_deadline_s,
            progress=progress,
        ),
        expect_version=(lambda _: client.expect_version(None)) if any_version else expect,
        progress=progress,
        counters=lambda: Counter(client.counters) + Counter(sandbox.counters) + reward.counters,
    )


def _episode_settings(config: Config) -> EpisodeSettings:
    rollout = config.rollout
    return EpisodeSettings(
        rollout.temperature,
        rollout.top_p,
        rollout.max_response_tokens,
        rollout.max_tool_calls,
        routes=config.algo.router_replay == "rollout",
    )


def wait_for_servers(config: Config, run: AsyncRunner) -> None:
    """Returns when every server answers. Raises ServerError for the first that does not within its start-up time,
    and Preempted."""
    for url in addresses("TORL_SERVERS"):
        run.raise_if_stopped()
        print(f"waiting for server {url}", flush=True)
        run(wait_ready(url, config.serving.startup_timeout_s))


def addresses(variable: str) -> tuple[str, ...]:
    """The addresses that the launcher put into the environment, separated by commas. Raises ConfigError without any."""
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(
            f"{variable} is not set; start the run with `torl train`, or set it to the addresses of the side-cars"
        )
    return tuple(value.split(","))
