"""`torl eval` and `torl rollout`: collecting without a trainer, from servers that serve what `model.path` holds."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable

from torl_mega.config import Config
from torl_mega.config_file import config_hash
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.build import GC_THRESHOLDS, AsyncRunner, build_collector, wait_for_servers
from torl_mega.rollout.collector import LiveCollector
from torl_mega.run.files import write_json
from torl_mega.run.folder import RunFolder
from torl_mega.run.metrics import RunMetrics


def evaluate(config: Config, folder: RunFolder, *, as_json: bool) -> int:
    """Scores `model.path` on `eval.data`; writes eval/step_00000.{json,md,jsonl} and prints the table."""
    if not config.eval.data:
        raise ConfigError("eval.data is empty; name benchmarks, e.g. 'eval.data=[data/torl_test.parquet]'")

    def work(collector: LiveCollector) -> int:
        collector.evaluate(0)
        print((folder.evaluations / f"step_00000.{'json' if as_json else 'md'}").read_text(), end="")
        return 0

    return _with_collector(config, folder, work)


def collect(config: Config, folder: RunFolder, *, as_json: bool) -> int:
    """Collects `num_steps` steps of trajectories from `model.path` and writes them as a run that can be replayed."""
    log = RunMetrics(folder.path, num_steps=config.num_steps, resume_at=0, tensorboard=config.logging.tensorboard)

    def work(collector: LiveCollector) -> int:
        for step in range(config.num_steps):
            log.step(step, collector.collect(step).metrics)
        summary = {"config_hash": config_hash(config), "steps": config.num_steps, "train": log.rows[-1]}
        write_json(folder.summary, summary)
        if as_json:
            print(json.dumps(summary))
        return 0

    try:
        return _with_collector(config, folder, work)
    finally:
        log.close()


def _with_collector(config: Config, folder: RunFolder, work: Callable[[LiveCollector], int]) -> int:
    gc.set_threshold(*GC_THRESHOLDS)
    with contextlib.ExitStack() as stack:
        run = AsyncRunner(StopFlag())
        stack.callback(run.close)
        tokenizer = Tokenizer(config.model.path)
        tokenizer.check_lossless()
        collector = build_collector(config, folder, tokenizer, run, stack, any_version=True)
        wait_for_servers(config, run)
        return work(collector)
