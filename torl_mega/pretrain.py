"""The rank program of `torl pretrain`: a language model on texts, by the trainer, checkpoints and export of an RL run.

    python -m torl_mega.pretrain CONF [a.b=value …]    started as torl_mega.train is, without servers and sandbox

        texts (rank 0) ─► share ─► forward_backward, optim_step (trainer) ─► log, checkpoint ─► hf/, summary.json

Contract: exit codes as of torl_mega.train. A run of the same name goes on from its last checkpoint and gives the weights of a run
that was never stopped. The loss is that of temperature 1. Of `rollout` and `data` only the lengths count; `reward`, `algo` and
`eval` are not looked at.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torl_mega.config import Config, PretrainConfig
from torl_mega.config_file import config_hash, load_config
from torl_mega.data.texts import batches
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, TorlError
from torl_mega.loop import due
from torl_mega.process import exit_codes
from torl_mega.process.start import forks_die_with_parent
from torl_mega.process.stop_flag import StopFlag
from torl_mega.run.files import write_json
from torl_mega.run.folder import RunFolder, open_run
from torl_mega.run.metrics import RunMetrics
from torl_mega.run.progress import Progress
from torl_mega.run.trackers import open_trackers
from torl_mega.run.versions import record_versions
from torl_mega.types import Sample


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one rank. `argv`: the config file and its overrides."""
    args = list(sys.argv[1:] if argv is None else argv)
    forks_die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|torl_mega\.trainer\.cpu)")
    try:
        return pretrain(load_config(args[0], args[1:]))
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr, flush=True)
        return exit_codes.ERROR


def pretrain(config: Config) -> int:
    """One rank's whole run: build, resume, train, export."""
    from torl_mega.trainer import parallel
    from torl_mega.trainer.megatron_trainer import MegatronTrainer
    from torl_mega.trainer.weights import checkpoint

    if config.pretrain is None:
        raise ConfigError("the config has no section pretrain")
    started = time.monotonic()
    stop = StopFlag()
    parallel.init_distributed(config.parallel, config.trainer)
    try:
        folder = parallel.share(lambda: open_run(config))
        trainer = MegatronTrainer(for_texts(config))
        latest = parallel.share(lambda: checkpoint.latest(folder.checkpoints))
        saved: Mapping[str, Any] = trainer.load(latest) if latest else {"steps_done": 0}
        start = int(saved["steps_done"])
        with contextlib.ExitStack() as stack:
            log = _log(config, folder, start, stack) if parallel.is_rank0() else None
            if log is not None:
                Progress.from_environment().phase("train")
            done = _steps(config, config.pretrain, trainer, folder, start, log, lambda: stop.requested)
        trainer.finish_saves()
        if done < config.num_steps:
            return exit_codes.REQUEUE
        if config.checkpoint.export_hf:
            trainer.export_hf(folder.hf)
        if log is not None:
            losses = [row["loss"] for row in log.rows]
            wall_s = time.monotonic() - started
            found = {"steps": len(losses), "loss": {"first": losses[0], "last": losses[-1]}, "wall_s": wall_s}
            write_json(folder.summary, {"config_hash": config_hash(config), **found})
            print(f"done: loss {losses[0]:.4f} -> {losses[-1]:.4f}; {folder.hf}", flush=True)
        return exit_codes.DONE
    finally:
        parallel.destroy()


def for_texts(config: Config) -> Config:
    """What the trainer is built with: temperature 1 and no reference model."""
    rollout = config.rollout.model_copy(update={"temperature": 1.0})
    algo = config.algo.model_copy(update={"kl_coef": 0.0})
    return config.model_copy(update={"rollout": rollout, "algo": algo})


def _steps(
    config: Config, texts: PretrainConfig, trainer: Any, folder: RunFolder, start: int, log: RunMetrics | None,
    stop_requested: Callable[[], bool],
) -> int:  # fmt: skip
    """Trains from step `start` on; how many steps are done in the end, the last of them saved."""
    from torl_mega.trainer import language_model, parallel

    rows = _batches(config, texts, start) if log is not None else iter(())
    for step in range(start, config.num_steps):
        begun = time.monotonic()
        batch: list[Sample] = parallel.share(lambda: next(rows))
        metrics = {**language_model.forward_backward(trainer, batch), **trainer.optim_step()}
        if log is not None:
            log.step(step, {**metrics, "step_s": time.monotonic() - begun})
        done = step + 1
        stops = parallel.share(stop_requested)
        if stops or done == config.num_steps or due(done, config.checkpoint.every_steps):
            trainer.save(folder.checkpoint(done), extra={"steps_done": done})
        if stops:
            return done
    return config.num_steps


def _log(config: Config, folder: RunFolder, start: int, stack: contextlib.ExitStack) -> RunMetrics:
    record_versions(folder.path, from_step=start)
    trackers = open_trackers(config, folder.path, resume_at=start)
    log = RunMetrics(folder.path, num_steps=config.num_steps, resume_at=start, trackers=trackers)
    stack.callback(log.close)
    return log


def _batches(config: Config, texts: PretrainConfig, start: int) -> Iterator[list[Sample]]:
    tokenizer = Tokenizer(config.model.path)
    tokenizer.check_lossless()
    return batches(
        texts.data, tokenizer, loss_on=texts.loss_on, max_tokens=config.max_train_tokens,
        overlong=config.data.overlong_prompts, size=texts.rows_per_step, seed=config.seed, skip=start,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
