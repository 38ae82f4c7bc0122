"""The rank program and composition root: builds every part from the config and hands them to the loop.

    python -m torl_mega.train CONF [a.b=value …]      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (torchrun's names)
                                                      and TORL_SERVERS, TORL_SANDBOX in the environment

        config ──► trainer (all ranks) ────────────────┐
               └─► rank 0: clients, reward, prompts ───┴─► Loop.run ──► summary.json, hf/

Exit codes: 0 done, 1 an error in one line, 85 stopped by SIGTERM/SIGUSR1 after a checkpoint (requeue me).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torl_mega.config import Config
from torl_mega.config_file import config_hash, load_config
from torl_mega.errors import TorlError
from torl_mega.interfaces import Rollouts, RunLog, Trainer, WeightSink
from torl_mega.loop import Loop, due
from torl_mega.process import start as process
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.build import Rank0, build_rank0
from torl_mega.rollout.replay import NoServers
from torl_mega.run.folder import RunFolder, open_run
from torl_mega.run.limits import check_guards
from torl_mega.run.metrics import Silent, summarize, write_json
from torl_mega.serving.probe_agreement import check_engines

EXIT_DONE, EXIT_ERROR, EXIT_REQUEUE = 0, 1, 85

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    process.forks_die_with_parent()  # Megatron writes checkpoints in forks
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # the engines say at every start which optional kernels they lack; `torl doctor` says it once, in order
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|torl_mega\.trainer\.cpu_backend)")
    try:
        return train(load_config(args[0], args[1:]))
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr, flush=True)
        return EXIT_ERROR


def train(config: Config) -> int:
    """One rank's whole run: build, resume, loop, finish."""
    from torl_mega.trainer import parallel
    from torl_mega.trainer.megatron_trainer import MegatronTrainer
    from torl_mega.trainer.weights import checkpoint

    started = time.monotonic()
    stop = StopFlag()
    parallel.init_distributed(config.parallel, config.trainer, share_cores=config.rollout.max_staleness > 0)
    try:
        with contextlib.ExitStack() as stack:
            folder = parallel.share(lambda: open_run(config))
            trainer = MegatronTrainer(config)
            latest = parallel.share(lambda: checkpoint.latest(folder.checkpoints))
            saved: Mapping[str, Any] = trainer.load(latest) if latest else {"steps_done": 0, "rollouts": None}
            rank0 = _on_rank0(
                lambda: stack.enter_context(build_rank0(config, folder, saved, stop, device=parallel.device()))
            )
            loop = _loop(config, folder, trainer, rank0, stop)
            start = int(saved["steps_done"])
            loop.log.first_sync(start, loop.sync(start))
            check_engines(trainer, rank0, config, parallel.share)
            complete = loop.run(start, evaluate_first=_lacks_evaluation(config, rank0, start))
            trainer.finish_saves()
            if not complete:
                return EXIT_REQUEUE
            if config.checkpoint.export_hf:
                trainer.export_hf(folder.hf)
            if rank0 is not None:
                _finish(config, folder, rank0, time.monotonic() - started)
            return EXIT_DONE
    finally:
        parallel.destroy()


def _loop(config: Config, folder: RunFolder, trainer: Trainer, rank0: Rank0 | None, stop: StopFlag) -> Loop:
    from torl_mega.serving.sync.weights import IdleSink
    from torl_mega.trainer import parallel

    rollouts: Rollouts = rank0.rollouts if rank0 else _Elsewhere()
    log: RunLog = rank0.log if rank0 else Silent()
    sink: WeightSink = NoServers() if config.rollout.replay else rank0.sink if rank0 else IdleSink()

    def save(done: int) -> None:
        state = parallel.share(lambda: {"steps_done": done, "rollouts": dict(rollouts.state())})
        trainer.save(folder.checkpoint(done), extra=state)

    return Loop(
        trainer=trainer,
        sink=sink,
        rollouts=rollouts,
        share=parallel.share,
        log=log,
        check_guards=lambda step, metrics: check_guards(step, metrics, config.guards),
        save=save,
        stop_requested=lambda: stop.requested,
        num_steps=config.num_steps,
        num_mini_batches=config.updates_per_step,
        eval_every=config.eval.every_steps,
        save_every=config.checkpoint.every_steps,
    )


def _lacks_evaluation(config: Config, rank0: Rank0 | None, start: int) -> bool:
    """Whether the evaluation that belongs to the first weights of this process was not made yet."""
    from torl_mega.trainer import parallel

    wanted = start in (0, config.num_steps) or due(start, config.eval.every_steps)
    return wanted and parallel.share(lambda: rank0 is not None and start not in rank0.log.evaluated_steps())


def _finish(config: Config, folder: RunFolder, rank0: Rank0, wall_s: float) -> None:
    summary = summarize(rank0.log.rows, config_hash=config_hash(config), wall_s=wall_s)
    write_json(folder.summary, summary)
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    if after:
        print(f"accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f}, code ratio {after['code_ratio']:.3f}")
    print(f"done: {folder.summary}", flush=True)


def _on_rank0(make: Callable[[], T]) -> T | None:
    """`make()` on rank 0, None elsewhere; what it raises is raised on every rank."""
    from torl_mega.trainer import parallel

    made: list[T] = []
    parallel.share(lambda: made.append(make()))
    return made[0] if made else None


class _Elsewhere:
    """The rollouts of ranks other than 0: they wait in `share`."""

    def collect(self, step: int) -> Any:
        raise AssertionError("only rank 0 collects")

    def evaluate(self, step: int) -> Any:
        raise AssertionError("only rank 0 evaluates")

    def state(self) -> Mapping[str, Any]:
        raise AssertionError("only rank 0 has a cursor")

    def restore(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("only rank 0 has a cursor")


if __name__ == "__main__":
    sys.exit(main())
