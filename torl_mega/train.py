"""The rank program and composition root: builds every part from the config and hands them to the loop.

    python -m torl_mega.train CONF [a.b=value …]      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (torchrun's names)
                                                      and TORL_SERVERS, TORL_SANDBOX in the environment

        config ──► trainer (all ranks), whose turn it is ┐
               └─► rank 0: collector, weight sink, log ──┴─► Loop.run ──► summary.json, hf/

Exit codes: 0 done, 1 an error in one line, 85 stopped by SIGTERM/SIGUSR1 after a checkpoint (requeue me).
"""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from torl_mega.algo.advice import warn_of_settings
from torl_mega.config import Config
from torl_mega.config_file import config_hash, load_config
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import Preempted, TorlError
from torl_mega.interfaces import Collector, NamedTensor, RunLog, Trainer, Turns, WeightSink
from torl_mega.loop import Loop, due
from torl_mega.process import exit_codes
from torl_mega.process.start import forks_die_with_parent
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.ahead import SamplingAhead
from torl_mega.rollout.build import GC_THRESHOLDS, AsyncRunner, addresses, build_collector, wait_for_servers
from torl_mega.rollout.recorder import write_scores
from torl_mega.rollout.replay import ReplayCollector
from torl_mega.rollout.sample_texts import sample_texts
from torl_mega.run.files import write_json
from torl_mega.run.folder import RunFolder, open_run
from torl_mega.run.limits import check_guards
from torl_mega.run.metrics import RunMetrics, summarize
from torl_mega.run.progress import Progress, ToldTurns
from torl_mega.run.trackers import open_trackers
from torl_mega.run.versions import record_versions
from torl_mega.serving.gate import TrainerGate, notes_folder
from torl_mega.serving.probe import check_engines
from torl_mega.serving.sync.paused import DrainedSink, PausedSink
from torl_mega.serving.sync.weights import make_owner_sink, make_weight_sink, route_weights
from torl_mega.serving.turns import Resident, SharedGpus, SharedServers
from torl_mega.types import TrainSample

TAKE_GPUS_S = 60.0  # for a server to let go, beyond the time after which a silent one is ended
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank0:
    """What rank 0 alone has."""

    collector: Collector
    sink: WeightSink
    log: RunMetrics
    tokenizer: Tokenizer
    server_urls: tuple[str, ...]  # empty when recorded trajectories are replayed
    run: AsyncRunner


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one rank. `argv`: the config file and its overrides."""
    args = list(sys.argv[1:] if argv is None else argv)
    forks_die_with_parent()  # Megatron writes checkpoints in forks
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # the engines say at every start which optional kernels they lack; `torl doctor` says it once, in order
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|torl_mega\.trainer\.cpu)")
    try:
        return train(load_config(args[0], args[1:]))
    except Preempted:  # before the loop, which saves: nothing was done
        return exit_codes.REQUEUE
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr, flush=True)
        return exit_codes.ERROR


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
            shared = parallel.share(lambda: bool(os.environ.get("TORL_TURNS")))
            servers = _on_rank0(lambda: take_gpus(config, stop)) if shared else None
            trainer = MegatronTrainer(config)
            latest = parallel.share(lambda: checkpoint.latest(folder.checkpoints))
            saved: Mapping[str, Any] = trainer.load(latest) if latest else {"steps_done": 0, "rollouts": None}
            where = f"goes on from {latest}, {saved['steps_done']} of {config.num_steps} steps" if latest else "begins"
            progress = Progress.from_environment() if parallel.rank() == 0 else Progress()
            _on_rank0(lambda: print(f"trainer ready after {_age_s():.0f} s; the run {where}", flush=True))
            progress.milestone("trainer", _age_s(), steps_done=saved["steps_done"], checkpoint=latest and str(latest))
            device = parallel.device()
            rank0 = _on_rank0(lambda: stack.enter_context(build_rank0(config, folder, saved, stop, device=device)))
            park = config.trainer.park_weights
            turns = SharedGpus(trainer, servers, parallel.share, park_weights=park) if shared else Resident()
            turns = ToldTurns(turns, progress)
            loop = _loop(config, folder, trainer, rank0, stop, turns)
            start = int(saved["steps_done"])
            loop.log.first_sync(start, loop.sync(start))
            check_engines(trainer, rank0, config, parallel.share, turns)
            if rank0 is not None and rank0.server_urls:
                print(f"weights sent and verified, log-probs agree, after {_age_s():.0f} s", flush=True)
                progress.milestone("weights", _age_s())
            complete = loop.run(start, evaluate_first=_lacks_evaluation(config, rank0, start))
            trainer.finish_saves()
            if not complete:
                return exit_codes.REQUEUE
            if config.checkpoint.export_hf:
                turns.save()
                trainer.export_hf(folder.hf)
            if rank0 is not None:
                _finish(config, folder, rank0, time.monotonic() - started)
            return exit_codes.DONE
    finally:
        parallel.destroy()


def _age_s() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def take_gpus(config: Config, stop: StopFlag) -> SharedServers:
    """Waits for the servers, which start first, and has them give their GPUs to the trainer. Raises TorlError."""
    with contextlib.closing(AsyncRunner(stop)) as run:
        wait_for_servers(config, run)
    serving = config.serving
    gate = TrainerGate(notes_folder(), serving.startup_timeout_s)
    limit_s = serving.hang_timeout_s + TAKE_GPUS_S
    servers = SharedServers(addresses("TORL_SERVERS"), gate, limit_s=limit_s, startup_s=serving.startup_timeout_s)
    servers.hold(frozenset())
    return servers


def _on_rank0(build: Callable[[], T]) -> T | None:
    """What `build` makes on rank 0, None elsewhere; what it raises is raised on every rank."""
    from torl_mega.trainer import parallel

    built: T | None = None

    def keep() -> None:  # shares the outcome, not what was built, which holds sockets and processes
        nonlocal built
        built = build()

    parallel.share(keep)
    return built


@contextlib.contextmanager
def build_rank0(
    config: Config, folder: RunFolder, saved: Mapping[str, Any], stop: StopFlag, *, device: str
) -> Iterator[Rank0]:
    """Everything of rank 0, closed again on the way out. `saved`: what the checkpoint keeps for the loop; `device`: where the
    trainer's tensors are. Raises TorlError before anything is sampled."""
    gc.set_threshold(*GC_THRESHOLDS)
    with contextlib.ExitStack() as stack:
        run = AsyncRunner(stop)
        stack.callback(run.close)
        tokenizer = Tokenizer(config.model.path)
        tokenizer.check_lossless()
        warn_of_settings(config.algo)
        steps_done = int(saved["steps_done"])
        record_versions(folder.path, from_step=steps_done)
        trackers = open_trackers(config, folder.path, resume_at=steps_done, samples=sample_texts(folder))
        log = RunMetrics(folder.path, num_steps=config.num_steps, resume_at=steps_done, trackers=trackers)
        stack.callback(log.close)
        if config.rollout.replay is not None:
            yield Rank0(ReplayCollector(config), NoServers(), log, tokenizer, (), run)
            return
        urls = addresses("TORL_SERVERS")
        in_flight = config.rollout.max_staleness > 1  # trajectories are being sampled during a sync
        flush_cache = not (in_flight and config.rollout.pause == "in_place")
        serving, owners = route_weights(config.serving)
        print(f"weights travel to {len(urls)} servers by {serving.transport}", flush=True)
        sink = make_weight_sink(serving, urls, device=device, flush_cache=flush_cache, owners=owners)
        if config.rollout.max_staleness == 0:
            collector: Collector = build_collector(config, folder, tokenizer, run, stack)
        else:
            collector = stack.enter_context(contextlib.closing(SamplingAhead(config, folder, stop)))
            pause = config.rollout.pause
            sink = PausedSink(sink, urls, pause) if in_flight else DrainedSink(sink, collector.drain)
        if saved["rollouts"] is not None:
            collector.restore(saved["rollouts"])
        wait_for_servers(config, run)
        yield Rank0(collector, sink, log, tokenizer, urls, run)


def _loop(
    config: Config, folder: RunFolder, trainer: Trainer, rank0: Rank0 | None, stop: StopFlag, turns: Turns
) -> Loop:
    from torl_mega.trainer import parallel

    other = OtherRank()
    collector: Collector = rank0.collector if rank0 else other
    log: RunLog = rank0.log if rank0 else other
    sink: WeightSink = (
        NoServers() if config.rollout.replay else rank0.sink if rank0 else _sink_of_other_rank(config, other)
    )

    def save(done: int) -> None:
        state = parallel.share(lambda: {"steps_done": done, "rollouts": dict(collector.state())})
        trainer.save(folder.checkpoint(done), extra=state)

    def record(step: int, samples: Sequence[TrainSample]) -> None:
        if rank0 and config.logging.trajectories and config.rollout.replay is None:
            write_scores(folder.trajectories, step, samples)

    return Loop(
        trainer=trainer,
        sink=sink,
        collector=collector,
        share=parallel.share,
        turns=turns,
        log=log,
        check_guards=lambda step, metrics: check_guards(step, metrics, config.guards),
        save=save,
        stop_requested=lambda: stop.requested,
        num_steps=config.num_steps,
        num_mini_batches=config.updates_per_step,
        eval_every=config.eval.every_steps,
        save_every=config.checkpoint.every_steps,
        record=record,
    )


def _sink_of_other_rank(config: Config, idle: WeightSink) -> WeightSink:
    """Of a rank other than 0: it hands weights to the servers beside it, if there are any."""
    from torl_mega.trainer import parallel

    serving, owners = route_weights(config.serving)
    return make_owner_sink(serving, parallel.rank(), device=parallel.device(), owners=owners) or idle


def _lacks_evaluation(config: Config, rank0: Rank0 | None, start: int) -> bool:
    """Whether the weights that this process starts from are to be evaluated and were not yet. The same on every rank."""
    from torl_mega.trainer import parallel

    wanted = start in (0, config.num_steps) or due(start, config.eval.every_steps)
    return wanted and parallel.share(lambda: rank0 is not None and start not in rank0.log.evaluated_steps())


def _finish(config: Config, folder: RunFolder, rank0: Rank0, wall_s: float) -> None:
    summary = summarize(rank0.log.rows, config_hash=config_hash(config), wall_s=wall_s)
    write_json(folder.summary, summary)
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    if after:
        print(f"accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f}, code ratio {after['code_ratio']:.3f}")
    print(f"done: {folder.summary}; look at it: torl view {folder.path}, torl report {folder.path}", flush=True)


class OtherRank:
    """Collector, log and weight sink of the ranks other than 0, which collect, log and send nothing."""

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        collections.deque(tensors, maxlen=0)  # rank 0 takes part in the collectives behind these tensors
        return {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def first_sync(self, step: int, report: Mapping[str, float]) -> None: ...

    def collect(self, step: int) -> Any:
        raise AssertionError("only rank 0 collects; the others wait in `share`")

    evaluate = collect

    def state(self) -> Any:
        raise AssertionError("only rank 0 has a cursor")

    def restore(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("only rank 0 has a cursor")


class NoServers:
    """The weight sink of every rank in a replay: nobody serves, so nothing is gathered or sent."""

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        return {}


if __name__ == "__main__":
    sys.exit(main())
