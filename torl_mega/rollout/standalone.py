"""The programs behind `torl eval`, `torl rollout` and `torl try`: they collect without a trainer, with what `model.path` holds.

python -m torl_mega.rollout.standalone eval|rollout|try CONF      with TORL_SERVERS, TORL_SANDBOX in the environment
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from dataclasses import replace

from torl_mega.config import Config
from torl_mega.config_file import config_hash, load_config
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import Preempted, TorlError
from torl_mega.process import exit_codes
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.benchmark_table import name_of_policy
from torl_mega.rollout.build import GC_THRESHOLDS, AsyncRunner, build_collector, wait_for_servers
from torl_mega.rollout.collector import LiveCollector
from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.rollout.sample_texts import sample_texts
from torl_mega.run.files import replacing, write_json
from torl_mega.run.folder import RunFolder
from torl_mega.run.metrics import RunMetrics
from torl_mega.run.trackers import open_trackers
from torl_mega.run.versions import record_versions
from torl_mega.serving.whose_weights import whose_weights
from torl_mega.types import Turn


def evaluate(config: Config, folder: RunFolder) -> None:
    """Scores `model.path` on `eval.data`; writes eval/NAME.{json,md,jsonl}, NAME as `name_of_policy` has it, and the same as
    eval/step_00000. Raises TorlError."""

    def work(collector: LiveCollector) -> None:
        collector.name = name_of_policy(config.model.path)
        collector.evaluate(0)
        for suffix in ("jsonl", "json", "md"):  # the latest, where scripts look for it
            at = folder.evaluations / f"step_00000.{suffix}"
            with replacing(at) as latest:
                latest.write((folder.evaluations / f"{collector.name}.{suffix}").read_bytes())

    _with_collector(config, folder, work)


def collect(config: Config, folder: RunFolder) -> None:
    """Collects `num_steps` steps of trajectories from `model.path`, as a run that can be replayed. Raises TorlError."""
    record_versions(folder.path, from_step=0)
    trackers = open_trackers(config, folder.path, resume_at=0, samples=sample_texts(folder))
    log = RunMetrics(folder.path, num_steps=config.num_steps, resume_at=0, trackers=trackers)

    def work(collector: LiveCollector) -> None:
        for step in range(config.num_steps):
            log.step(step, collector.collect(step).metrics)
        summary = {"config_hash": config_hash(config), "steps": config.num_steps, "train": log.rows[-1]}
        write_json(folder.summary, summary)

    try:
        _with_collector(config, folder, work)
    finally:
        log.close()


def answer(config: Config, folder: RunFolder) -> None:
    """One attempt at the one problem of `data.train`, printed turn by turn. Raises TorlError."""

    def tell(turn: Turn) -> None:
        print(f"\n{_bar('assistant')}\n{turn.text.strip()}")
        for call in turn.tool_calls:
            what = f"{call.tool or 'no tool'} · {call.status.value} · {call.wall_s:.2f} s"
            print(f"\n{_bar(what)}\n{call.observation.strip()}")
        sys.stdout.flush()

    def work(collector: LiveCollector) -> None:
        collector.episode = replace(collector.episode, tell=tell)
        (prompt,) = collector.prompts.next(1)
        print(f"{_bar('problem')}\n{prompt.problem.problem}", flush=True)
        collector.prompts.put_back([prompt])
        collector.collect(0)
        (group,) = read_groups(step_path(folder.trajectories, 0))
        if not group.trajectories:
            raise TorlError(f"the attempt was lost to faults of servers or tools; see {folder.logs}")
        (found,), (reward,) = group.trajectories, group.rewards
        tokens = f"{len(found.response_ids)} tokens, ended by {found.stop_reason.value}"
        said = reward.extracted or "nothing in a \\boxed{}"
        print(f"\n{_bar('answer')}\n{said}\n({tokens})", flush=True)

    _with_collector(config, folder, work)


def _bar(text: str) -> str:
    return f"── {text} ".ljust(72, "─")


def _with_collector(config: Config, folder: RunFolder, work: Callable[[LiveCollector], object]) -> None:
    gc.set_threshold(*GC_THRESHOLDS)
    with contextlib.ExitStack() as stack:
        run = AsyncRunner(None)  # until there is something to close in order, a stop request ends this process
        stack.callback(run.close)
        tokenizer = Tokenizer(config.model.path)
        tokenizer.check_lossless()
        collector = build_collector(config, folder, tokenizer, run, stack, any_version=True)
        run.stops_at(StopFlag())
        wait_for_servers(config, run)
        if config.serving.urls:  # which loaded what they like
            for line in run(whose_weights(config.serving.urls, config.model.path)):
                print(line, flush=True)
        work(collector)


def main() -> int:
    program, conf = sys.argv[1:]
    try:
        config = load_config(conf)
        {"eval": evaluate, "rollout": collect, "try": answer}[program](config, RunFolder.of(config))
    except Preempted:
        return exit_codes.REQUEUE
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr, flush=True)
        return exit_codes.ERROR
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
