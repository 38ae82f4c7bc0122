"""`torl train --dry-run`: everything that a run would find wrong before its first step, without a server or a trainer.

The model, tokenizer, data, run folder and sandbox as `torl doctor CONF` looks at them, and then what the doctor leaves out because
it can take a minute: the benchmarks are read, every gold answer goes through the grader, a reward function of the user's is
imported by the process that will call it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from torl_mega.config import Config
from torl_mega.data.golds import judge_golds, read_golds
from torl_mega.data.prompts import EncodeProblem, PromptSource
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.launch import checks
from torl_mega.launch.checks import Check
from torl_mega.launch.doctor import print_checks
from torl_mega.launch.inputs import check_inputs
from torl_mega.launch.place import place_here
from torl_mega.launch.preflight import this_node
from torl_mega.reward.function import make_reward
from torl_mega.rollout.evaluate import load_benchmarks
from torl_mega.rollout.tools import tool_and_prompts


def run(config: Config) -> int:
    """Prints what was found; 1 when the run would not start. Raises TorlError for a layout or input that cannot work."""
    placement = place_here(config, trains=True)
    check_inputs(config, placement.world_size)
    where = "CPU" if placement.gpu == "cpu" else f"{placement.gpus_per_node} {placement.gpu}"
    print(
        f"{config.name}: {placement.world_size} rank(s), {len(placement.of('server'))} server(s), a sandbox; on {where}"
    )
    found = checks.config_checks(config)
    if config.rollout.replay is None and all(check.level != "fail" for check in found):
        found += checks.guarded("rewards", lambda: _rewards(config))
        found += checks.guarded("benchmarks", lambda: _benchmarks(config))
    print_checks({this_node(): found}, everything=True)
    return int(any(check.level == "fail" for check in found))


def _rewards(config: Config) -> Iterator[Check]:
    files = PromptSource(config.data, _prompts(config), seed=config.seed).files
    reward = make_reward(config.reward, max_response_tokens=config.rollout.max_response_tokens)

    async def ask() -> list[str]:
        await reward.start()
        try:
            if config.reward.function is not None:
                return [f"{config.reward.function} is there"]
            said = []
            for spec, problems in files:
                golds = await read_golds(problems, reward.is_readable)
                judge_golds(spec, golds, most=config.data.max_unreadable_golds)
                said.append(
                    f"{spec}: {golds.num_asked - len(golds.unreadable):,} of {golds.num_asked:,} golds are read"
                )
            return said or ["nothing to look at: the problems are generated"]
        finally:
            await reward.close()

    yield Check("rewards", "ok", "; ".join(asyncio.run(ask())))


def _benchmarks(config: Config) -> Iterator[Check]:
    found = load_benchmarks(config.eval, config.data, _prompts(config))
    yield Check("benchmarks", "ok", ", ".join(f"{b.name} ({len(b.prompts):,})" for b in found) or "none")


def _prompts(config: Config) -> EncodeProblem:
    return tool_and_prompts(config, Tokenizer(config.model.path))[1]
