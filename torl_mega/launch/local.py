"""`torl train|pretrain|eval|rollout` on one machine: places the run here and starts the tasks that srun starts on a cluster.

    torl train ─► place (one node) ─┬─ task sandbox ─► torl_mega.sandbox.serve
                                    ├─ task server ──► torl_mega.serving.serve, one SGLang server each
                                    └─ task rank ────► torl_mega.train

Contract: a task (launch/task.py) looks after its process; the launcher starts the tasks, shows what rank 0 writes, hands
stop signals on as the note `stop`, and starts all of them again when a rank was killed, as launch/common.sh does. Every
task dies with its whole tree and its temporary files when the launcher dies, even by SIGKILL (see process/start.py).
Exit codes: process/exit_codes.py. The launcher imports no engine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torl_mega.config import Config
from torl_mega.errors import ConfigError, TorlError
from torl_mega.launch.commands import task_command
from torl_mega.launch.console import Header, Plain, Voice, Watched, make_console
from torl_mega.launch.inputs import EVALUATED, check_inputs, check_program, check_texts, freeze, without_trainer
from torl_mega.launch.place import place_here, with_addresses
from torl_mega.launch.task import ERROR_MARK, last_words
from torl_mega.planner.placement import Placement
from torl_mega.process import exit_codes
from torl_mega.process.exit_codes import as_shell_code
from torl_mega.process.start import GuardedProcess, short_tempdir, start
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.benchmark_table import name_of_policy
from torl_mega.run import progress
from torl_mega.run.folder import RunFolder, is_complete, lock_run, make_folder, open_run

POLL_S = 0.1
GRACE_S = 60.0  # for ranks that were told to stop: finish or drop the step, write a checkpoint
START_GRACE_S = 6.0  # while there is nothing to keep yet
STOP_S = 5.0  # for tasks that are ended because the run is over
COLLECTING = ("eval", "rollout", "try")  # programs without a trainer, which keep nothing of a step that is not done
LONGEST_TEMPDIR = 50  # an attempt's folder and a task's in it are some 25 bytes more


def train(config: Config, *, json: bool = False) -> int:
    """Runs the whole job, or what is left of it; returns the exit code. Raises TorlError before anything is started."""
    if config.pretrain is not None:
        raise ConfigError("the config has a section pretrain, which is `torl pretrain`'s; leave it out to train by RL")
    placement = place_here(config, trains=True)
    check_inputs(config, placement.world_size)
    return _trained("rank", config, placement, json=json)


def pretrain(config: Config) -> int:
    """As `train`, with texts: neither servers nor a sandbox are started."""
    placement = place_here(config, trains=True)
    check_texts(config, placement.world_size)
    return _trained("pretrain", config, placement, json=False)


def _trained(program: str, config: Config, placement: Placement, *, json: bool) -> int:
    with _held(config) as folder:
        console = make_console(sys.stdout, as_json=json)
        if is_complete(folder, config):
            console.say_unless_json(
                f"{folder.path} is complete ({config.num_steps} steps): {folder.summary}; raise num_steps to go on"
            )
            console.end(exit_codes.DONE, None, folder.summary)
            return exit_codes.DONE
        return _attempts(program, config, placement, folder, console)


def collect(program: str, config: Config, *, json: bool) -> int:
    """Runs `eval`, `rollout` or `try` of rollout/standalone.py beside servers and a sandbox; prints its result to stdout."""
    check_program(program, config)
    config = without_trainer(config)
    placement = place_here(config, trains=False)
    check_inputs(config, None)
    with _held(config, free=EVALUATED if program == "eval" else frozenset()) as folder:
        evaluation = program == "eval"
        console = make_console(sys.stderr if evaluation else sys.stdout, as_json=json)
        result = (
            folder.evaluations / f"{name_of_policy(config.model.path)}.{'json' if json else 'md'}"
            if evaluation
            else None
        )
        return _attempts(program, config, placement, folder, console, result)


@contextlib.contextmanager
def _held(config: Config, *, free: frozenset[str] = frozenset()) -> Iterator[RunFolder]:
    lock = lock_run(make_folder(config))  # first: a run that goes on keeps its config.json
    try:
        yield open_run(config, free=free)
    finally:
        os.close(lock)


def _attempts(
    program: str, config: Config, placement: Placement, folder: RunFolder, console: Plain, result: Path | None = None
) -> int:
    """`_run_attempts`, and the end of it on the console. `result`: what is printed when the run is done."""
    code, error = exit_codes.ERROR, None
    try:
        code, error = _run_attempts(program, config, placement, folder, console)
        return code
    except TorlError as exc:
        error = str(exc)
        raise
    finally:
        if code == exit_codes.DONE and result is not None:
            console.result(result)
        console.end(code, error, folder.summary)


def _run_attempts(
    program: str, config: Config, placement: Placement, folder: RunFolder, console: Plain
) -> tuple[int, str | None]:
    """Starts everything, again while a signal ended a rank; the exit code in the end, and why where it is an error."""
    text = os.environ.get("TORL_MAX_RESTARTS", "3")
    if not text.isdecimal():
        raise ConfigError(f"TORL_MAX_RESTARTS = {text} is not a number")
    conf = freeze(config, folder, "local")
    console.header(_header(program, config, placement, folder))
    stop = StopFlag(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for left in reversed(range(int(text) + 1)):
        voice = Voice(folder.logs / "rank_0.log", console)
        watched = Watched(folder.metrics, config.num_steps, voice, trains=program not in COLLECTING)
        code = _attempt(program, placement, conf, folder, stop, watched)
        if code != exit_codes.DONE and stop.requested:
            return exit_codes.REQUEUE, None
        if code < 128:
            return code, voice.error
        if left:
            console.restart(code)
    error = f"ranks were killed {int(text) + 1} times (last code {code}); logs in {folder.logs}"
    console.warn(f"{ERROR_MARK}{error}")
    return exit_codes.KILLED_TOO_OFTEN, error


def _attempt(
    program: str, placement: Placement, conf: Path, folder: RunFolder, stop: StopFlag, watched: Watched
) -> int:
    """Starts all tasks; the exit code of the ranks once all have ended: the highest, as srun has it."""
    scratch, file, status = _scratch_folder(), folder.logs / "placement.json", folder.logs / "status"
    placement = with_addresses(placement, scratch)
    file.write_text(placement.to_json())
    shutil.rmtree(status, ignore_errors=True)
    watched.notes = status / "progress"
    watched.notes.mkdir(parents=True)
    stop.on_request = (status / "stop").touch
    if stop.requested:  # before this attempt had a place to note it
        stop.on_request()
    ranks, sidecars = [], []
    try:
        for process in reversed(placement.processes):  # side-cars first: they take longest to come up
            is_rank = process.role == "rank"
            here = {"TORL_NODE": process.host, "TORL_LOCAL_ID": str(process.local), "TORL_STATUS": str(status)}
            task = start(
                task_command(program if is_rank else process.role, file, conf),
                name=process.name,
                log_path=folder.logs / f"{process.name}.log",
                env={**os.environ, **here, progress.VARIABLE: str(watched.notes)},
                scratch=scratch / process.name,
            )
            (ranks if is_rank else sidecars).append(task)
        return _watch(ranks, sidecars, status, stop, watched)
    finally:
        (status / "end").touch()
        _end_all(ranks, sidecars, stop)
        watched.voice.close(last_words(status))


def _watch(
    ranks: list[GuardedProcess], sidecars: list[GuardedProcess], status: Path, stop: StopFlag, watched: Watched
) -> int:
    deadline: float | None = None
    grace = 0.0
    while None in (codes := [rank.poll() for rank in ranks]):
        watched.look(status, num_servers=sum(car.name.startswith("server") for car in sidecars))
        if stop.requested and deadline is None:
            grace = GRACE_S if watched.has_begun else START_GRACE_S
            deadline = time.monotonic() + grace
            watched.voice.console.stop(stop.signal_name, _what_stopping_means(watched, grace))
        elif deadline is None and any(car.poll() is not None for car in sidecars):
            (status / "lost").touch()
        if stop.interrupts > 1:
            watched.voice.console.stop(stop.signal_name, "ending at once; what was saved before is kept")
            return exit_codes.REQUEUE
        if deadline is not None and time.monotonic() > deadline:
            if not watched.has_begun:
                return exit_codes.REQUEUE  # nothing that was made in this attempt is lost
            raise TorlError(f"the ranks did not stop within {grace:g} s after {stop.signal_name}; killed")
        time.sleep(POLL_S)
    return max(as_shell_code(code) for code in codes if code is not None)


def _what_stopping_means(watched: Watched, grace_s: float) -> str:
    if not watched.trains:
        kept = "what was collected so far is dropped"
    elif watched.has_begun:
        kept = "the step that is being made is dropped, the others are kept in a checkpoint; the same command goes on from there"
    else:
        kept = "no step was begun, nothing is lost; the same command starts again"
    return f"stopping, within {grace_s:g} s: {kept} (once more ends at once)"


def _end_all(ranks: list[GuardedProcess], sidecars: list[GuardedProcess], stop: StopFlag) -> None:
    """Ends all side by side. A rank that still runs had its time; another Ctrl-C takes that of the side-cars away."""
    for task in ranks:
        task.begin_stop(0.0)
    for task in sidecars:
        task.begin_stop(STOP_S)
    deadline = time.monotonic() + STOP_S
    while stop.interrupts < 2 and time.monotonic() < deadline and any(car.poll() is None for car in sidecars):
        time.sleep(POLL_S / 2)
    for task in (*ranks, *sidecars):
        task.stop(0.0)


def _header(program: str, config: Config, placement: Placement, folder: RunFolder) -> Header:
    """What runs where, and how to watch it."""
    numbers = {role: len(placement.of(role)) for role in ("rank", "server", "sandbox")}
    return Header(
        name=config.name,
        folder=str(folder.path),
        program="train" if program == "rank" else program,
        where="CPU cores" if placement.gpu == "cpu" else f"{placement.gpus_per_node} {placement.gpu}",
        ranks=numbers["rank"],
        servers=numbers["server"],
        sandboxes=numbers["sandbox"],
        num_steps=config.num_steps,
        logs=str(folder.logs),
        tensorboard=str(folder.path / "tensorboard") if config.logging.tensorboard else None,
    )


def _scratch_folder() -> Path:
    """A new folder for all temporary files of an attempt."""
    scratch = Path(tempfile.mkdtemp(prefix="torl-", dir=short_tempdir(LONGEST_TEMPDIR)))
    scratch.chmod(0o711)  # a sandbox in it runs snippets as other users
    return scratch
