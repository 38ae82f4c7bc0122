"""Programs that collect without a trainer: `torl eval` and `torl rollout`. The servers serve what `model.path` holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from torl_mega.config import Config
from torl_mega.config_file import config_hash
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.build import AsyncRunner, build_rollouts, wait_for_servers
from torl_mega.rollout.service import RolloutService
from torl_mega.run.folder import RunFolder
from torl_mega.run.metrics import RunMetrics, write_json


def evaluate(config: Config, folder: RunFolder, *, as_json: bool) -> int:
    """Scores `model.path` on `eval.data`; writes eval/step_00000.{json,md,jsonl} and prints the table."""
    if not config.eval.data:
        raise ConfigError("eval.data is empty; name benchmarks, e.g. 'eval.data=[data/torl_test.parquet]'")

    def work(rollouts: RolloutService) -> int:
        rollouts.evaluate(0)
        report = folder.path / "eval" / "step_00000"
        print(Path(f"{report}.json" if as_json else f"{report}.md").read_text(), end="")
        return 0

    return _with_rollouts(config, folder, work)


def collect(config: Config, folder: RunFolder, *, as_json: bool) -> int:
    """Collects `num_steps` steps of trajectories from `model.path` and writes them as a run that can be replayed."""
    log = RunMetrics(folder.path, num_steps=config.num_steps, resume_at=0, tensorboard=config.logging.tensorboard)

    def work(rollouts: RolloutService) -> int:
        for step in range(config.num_steps):
            log.step(step, rollouts.collect(step).metrics)
        summary = {"config_hash": config_hash(config), "steps": config.num_steps, "train": log.rows[-1]}
        write_json(folder.path / "summary.json", summary)
        if as_json:
            print(json.dumps(summary))
        return 0

    try:
        return _with_rollouts(config, folder, work)
    finally:
        log.close()


def _with_rollouts(config: Config, folder: RunFolder, work: Callable[[RolloutService], int]) -> int:
    with contextlib.ExitStack() as stack:
        run = AsyncRunner(StopFlag())
        stack.callback(run.close)
        tokenizer = Tokenizer(config.model.path)
        tokenizer.check_lossless()
        rollouts = build_rollouts(config, folder, tokenizer, run, stack, any_version=True)
        wait_for_servers(config, run)
        return work(rollouts)
