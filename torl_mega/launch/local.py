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
from typing import TextIO

from torl_mega.config import Config
from torl_mega.errors import ConfigError, TorlError
from torl_mega.launch.commands import task_command
from torl_mega.launch.inputs import check_inputs, check_texts, freeze, without_trainer
from torl_mega.launch.place import place_here, with_addresses
from torl_mega.launch.task import ERROR_MARK, last_words
from torl_mega.planner.placement import Placement
from torl_mega.process import exit_codes
from torl_mega.process.exit_codes import as_shell_code
from torl_mega.process.start import GuardedProcess, short_tempdir, start
from torl_mega.process.stop_flag import StopFlag
from torl_mega.run.folder import RunFolder, is_complete, lock_run, make_folder, open_run

POLL_S = 0.1
GRACE_S = 60.0  # for ranks that were told to stop: finish or drop the step, write a checkpoint
STOP_S = 5.0  # for tasks that are ended because the run is over
LONGEST_TEMPDIR = 50  # an attempt's folder and a task's in it are some 25 bytes more


def train(config: Config) -> int:
    """Runs the whole job, or what is left of it; returns the exit code. Raises TorlError before anything is started."""
    if config.pretrain is not None:
        raise ConfigError("the config has a section pretrain, which is `torl pretrain`'s; leave it out to train by RL")
    placement = place_here(config, trains=True)
    check_inputs(config, placement.world_size)
    return _trained("rank", config, placement)


def pretrain(config: Config) -> int:
    """As `train`, with texts: neither servers nor a sandbox are started."""
    placement = place_here(config, trains=True)
    check_texts(config, placement.world_size)
    return _trained("pretrain", config, placement)


def _trained(program: str, config: Config, placement: Placement) -> int:
    with _held(config) as folder:
        if is_complete(folder, config):
            print(f"{folder.path} is complete ({config.num_steps} steps): {folder.summary}; raise num_steps to go on")
            return exit_codes.DONE
        return _attempts(program, config, placement, folder, sys.stdout)


def collect(program: str, config: Config, *, json: bool) -> int:
    """Runs `eval` or `rollout` of rollout/standalone.py beside servers and a sandbox; prints its result to stdout."""
    config = without_trainer(config)
    placement = place_here(config, trains=False)
    check_inputs(config, None)
    with _held(config) as folder:
        report = folder.path / "eval" / f"step_00000.{'json' if json else 'md'}"
        result = report if program == "eval" else folder.summary if json else None
        code = _attempts(program, config, placement, folder, sys.stderr if result else sys.stdout)
        if code == exit_codes.DONE and result:
            print(result.read_text(), end="")
        return code


@contextlib.contextmanager
def _held(config: Config) -> Iterator[RunFolder]:
    lock = lock_run(make_folder(config))  # first: a run that goes on keeps its config.json
    try:
        yield open_run(config)
    finally:
        os.close(lock)


def _attempts(program: str, config: Config, placement: Placement, folder: RunFolder, console: TextIO) -> int:
    """Starts everything, again while a signal ended a rank; the exit code in the end. `console` gets what rank 0 says."""
    text = os.environ.get("TORL_MAX_RESTARTS", "3")
    if not text.isdecimal():
        raise ConfigError(f"TORL_MAX_RESTARTS = {text} is not a number")
    conf = freeze(config, folder, "local")
    print(_what_starts(config, placement, folder), file=console, flush=True)
    stop = StopFlag(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for left in reversed(range(int(text) + 1)):
        code = _attempt(program, placement, conf, folder, stop, _Voice(folder.logs / "rank_0.log", console))
        if code != exit_codes.DONE and stop.requested:
            return exit_codes.REQUEUE
        if code < 128:
            return code
        if left:
            _say(f"torl: a rank was killed (code {code}); the ranks start again from the last checkpoint")
    _say(f"torl: error: ranks were killed {int(text) + 1} times (last code {code}); logs in {folder.logs}")
    return exit_codes.KILLED_TOO_OFTEN


def _attempt(program: str, placement: Placement, conf: Path, folder: RunFolder, stop: StopFlag, voice: _Voice) -> int:
    """Starts all tasks; the exit code of the ranks once all have ended: the highest, as srun has it."""
    scratch, file, status = _scratch_folder(), folder.logs / "placement.json", folder.logs / "status"
    placement = with_addresses(placement, scratch)
    file.write_text(placement.to_json())
    shutil.rmtree(status, ignore_errors=True)
    status.mkdir()
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
                env={**os.environ, **here},
                scratch=scratch / process.name,
            )
            (ranks if is_rank else sidecars).append(task)
        return _watch(ranks, sidecars, status, stop, voice)
    finally:
        (status / "end").touch()
        for task in (*ranks, *sidecars):
            task.stop(STOP_S)
        voice.close(last_words(status))


def _watch(
    ranks: list[GuardedProcess], sidecars: list[GuardedProcess], status: Path, stop: StopFlag, voice: _Voice
) -> int:
    deadline: float | None = None
    started, told = time.monotonic(), set[Path]()
    while None in (codes := [rank.poll() for rank in ranks]):
        for note in sorted(set(status.glob("*.ready")) - told):
            voice.say(f"{note.stem} ready after {time.monotonic() - started:.0f} s")
            told.add(note)
        voice.copy()
        if stop.requested and deadline is None:
            deadline = time.monotonic() + GRACE_S
            _say(
                f"torl: {stop.signal_name}: stopping, within {GRACE_S:g} s: the step that is being made is dropped, the others are "
                f"kept in a checkpoint; the same command goes on from there"
            )
        elif deadline is None and any(car.poll() is not None for car in sidecars):
            (status / "lost").touch()
        if deadline is not None and time.monotonic() > deadline:
            raise TorlError(f"the ranks did not stop within {GRACE_S:g} s after {stop.signal_name}; killed")
        time.sleep(POLL_S)
    return max(as_shell_code(code) for code in codes if code is not None)


class _Voice:
    """Copies what rank 0 writes into its log from now on to the console; errors to stderr."""

    def __init__(self, log: Path, console: TextIO) -> None:
        log.touch()
        self._file, self._console = log.open("rb"), console
        self._file.seek(0, os.SEEK_END)
        self._errors: list[str] = []

    def say(self, text: str) -> None:
        """A line of our own between those of rank 0."""
        print(text, file=self._console, flush=True)

    def copy(self) -> None:
        for line in self._file:
            error = line.startswith(ERROR_MARK.encode())
            if error:
                self._errors.append(line.decode(errors="replace").rstrip("\n"))
            out = sys.stderr if error else self._console
            out.buffer.write(line)
            out.flush()

    def close(self, last_words: list[str]) -> None:
        """Copies the rest, and says those of the run's last words that rank 0 has not said."""
        self.copy()
        self._file.close()
        for line in last_words:
            if line not in self._errors:
                _say(line)


def _what_starts(config: Config, placement: Placement, folder: RunFolder) -> str:
    """What runs where, and how to watch it."""
    where = "CPU cores" if placement.gpu == "cpu" else f"{placement.gpus_per_node} {placement.gpu}"
    parts = {role: len(placement.of(role)) for role in ("rank", "server", "sandbox")}
    counted = ", ".join(f"{n} {role}{'s' if n > 1 else ''}" for role, n in parts.items() if n)
    watch = f"; curves: tensorboard --logdir {folder.path / 'tensorboard'}" if config.logging.tensorboard else ""
    return f"{config.name}: {counted} on {where}; each one's log is in {folder.logs}{watch}"


def _scratch_folder() -> Path:
    """A new folder for all temporary files of an attempt."""
    scratch = Path(tempfile.mkdtemp(prefix="torl-", dir=short_tempdir(LONGEST_TEMPDIR)))
    scratch.chmod(0o711)  # a sandbox in it runs snippets as other users
    return scratch


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
