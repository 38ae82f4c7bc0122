"""The programs behind `torl eval` and `torl rollout`: they collect without a trainer, with what `model.path` holds.

python -m torl_mega.rollout.standalone eval|rollout CONF      with TORL_SERVERS, TORL_SANDBOX in the environment
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable

from torl_mega.config import Config
from torl_mega.config_file import config_hash, load_config
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, Preempted, TorlError
from torl_mega.process import exit_codes
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.build import GC_THRESHOLDS, AsyncRunner, build_collector, wait_for_servers
from torl_mega.rollout.collector import LiveCollector
from torl_mega.run.files import write_json
from torl_mega.run.folder import RunFolder
from torl_mega.run.metrics import RunMetrics


def evaluate(config: Config, folder: RunFolder) -> None:
    """Scores `model.path` on `eval.data`; writes eval/step_00000.{json,md,jsonl}. Raises TorlError."""
    if not config.eval.data:
        raise ConfigError("eval.data is empty; name benchmarks, e.g. 'eval.data=[data/torl_test.parquet]'")

    _with_collector(config, folder, lambda collector: collector.evaluate(0))


def collect(config: Config, folder: RunFolder) -> None:
    """Collects `num_steps` steps of trajectories from `model.path`, as a run that can be replayed. Raises TorlError."""
    log = RunMetrics(folder.path, num_steps=config.num_steps, resume_at=0, tensorboard=config.logging.tensorboard)

    def work(collector: LiveCollector) -> None:
        for step in range(config.num_steps):
            log.step(step, collector.collect(step).metrics)
        summary = {"config_hash": config_hash(config), "steps": config.num_steps, "train": log.rows[-1]}
        write_json(folder.summary, summary)

    try:
        _with_collector(config, folder, work)
    finally:
        log.close()


def _with_collector(config: Config, folder: RunFolder, work: Callable[[LiveCollector], object]) -> None:
    gc.set_threshold(*GC_THRESHOLDS)
    with contextlib.ExitStack() as stack:
        run = AsyncRunner(StopFlag())
        stack.callback(run.close)
        tokenizer = Tokenizer(config.model.path)
        tokenizer.check_lossless()
        collector = build_collector(config, folder, tokenizer, run, stack, any_version=True)
        wait_for_servers(config, run)
        work(collector)


def main() -> int:
    program, conf = sys.argv[1:]
    try:
        config = load_config(conf)
        {"eval": evaluate, "rollout": collect}[program](config, RunFolder.of(config))
    except Preempted:
        return exit_codes.REQUEUE
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr, flush=True)
        return exit_codes.ERROR
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
