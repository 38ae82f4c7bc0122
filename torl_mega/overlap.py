"""Sampling the next steps while the trainer updates: the rollouts live in a child process of rank 0.

    rank 0 (trainer's GIL)                 child (rollouts' GIL)
      collect(s) ──────── batch s ◄──────── collected step s
         └─ asks for s+1 … s+k ───────────► collects them one after another
      train on s  (meanwhile)               sampling
      sync s+1: k = 1: waits for step s+1 first, so each batch has one policy version (one-step-off)
                k > 1: servers pause, take the weights, go on; a trajectory then has several versions

Bound: step b is asked for after sync b-k, so no token of it is older than b-k; the client refuses any other, and every
sample carries the version of each of its tokens. Resume: batches that were collected but not trained are read back from
the recorded trajectories, unfinished ones are collected again; nothing is trained twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from torl_mega.config import Config
from torl_mega.data.samples import make_samples
from torl_mega.errors import Preempted, TorlError
from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.run_folder import RunFolder
from torl_mega.stop_flag import StopFlag
from torl_mega.types import StepBatch

POLL_S = 0.2
CLOSE_S = 10.0
PR_SET_PDEATHSIG = 1


class OverlappedRollouts:
    """Implements `Rollouts`. `drain` must be called before a weight sync when `max_staleness` is 1."""

    def __init__(self, config: Config, folder: RunFolder, stop: StopFlag) -> None:
        self._config, self._folder, self._stop = config, folder, stop
        self._ready: dict[int, StepBatch] = {}
        self._cursor: Any = None  # after the last batch that came home
        self._asked = 0  # steps below it were asked for, or came from a checkpoint
        self._in_flight: list[int] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(config, folder, theirs), name="torl-rollouts", daemon=False)
        self._child.start()
        theirs.close()
        self._cursor = self._receive()

    # ------------------------------------------------------------------------------------------------ Rollouts

    def collect(self, step: int) -> StepBatch:
        ahead = min(step + self._config.rollout.max_staleness, self._config.num_steps - 1)
        self._ask(step)
        while step not in self._ready:
            self._take()
        self._ask(ahead)
        return self._ready.pop(step)

    def evaluate(self, step: int) -> Mapping[str, float]:
        self.drain()
        return self._command("evaluate", step)

    def state(self) -> Mapping[str, Any]:
        while self._in_flight and self._pipe.poll():
            self._take()
        return {"cursor": self._cursor, "collected": {str(s): dict(b.metrics) for s, b in self._ready.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor = state["cursor"]
        self._command("restore", self._cursor)
        for step, metrics in sorted((int(s), m) for s, m in state["collected"].items()):
            groups = read_groups(step_path(self._folder.trajectories, step))
            self._ready[step] = StepBatch(tuple(make_samples(groups, self._config.algo)), metrics)

    # ------------------------------------------------------------------------------------------------ the child

    def drain(self) -> None:
        """Waits until nothing is being sampled."""
        while self._in_flight:
            self._take()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(("close", None))
        self._child.join(CLOSE_S)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
        self._pipe.close()

    def _ask(self, last: int) -> None:
        """Everything up to `last` that is neither home nor under way, in order."""
        first = max([self._asked, *(s + 1 for s in self._ready)], default=0)
        for step in range(first, last + 1):
            self._pipe.send(("collect", step))
            self._in_flight.append(step)
        self._asked = max(first, last + 1)

    def _take(self) -> None:
        """The next batch comes home. If it failed, what was asked for after it is dropped, to be asked for again."""
        step = self._in_flight.pop(0)
        try:
            self._ready[step], self._cursor = self._receive()
        except TorlError:
            while self._in_flight:
                self._in_flight.pop(0)
                with contextlib.suppress(TorlError):
                    self._receive()
            self._asked = step
            self._command("restore", self._cursor)
            raise

    def _command(self, name: str, value: Any) -> Any:
        self._pipe.send((name, value))
        return self._receive()

    def _receive(self) -> Any:
        """The child's next answer. What it raised is raised here; a stop request ends the wait."""
        while not wait([self._pipe, self._child.sentinel], timeout=POLL_S):
            if self._stop.requested:
                raise Preempted
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            self._child.join(CLOSE_S)
            raise TorlError(
                f"the rollout process ended with code {self._child.exitcode}; resume from the checkpoint"
            ) from None
        if not ok:
            raise value
        return value


def _serve(config: Config, folder: RunFolder, pipe: Connection) -> None:
    """The child: one command at a time, in order."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides when to stop
    with contextlib.ExitStack() as stack:
        commands: dict[str, Callable[[Any], Any]] = {}
        _answer(pipe, lambda _: _build(config, folder, commands, stack), None)
        while commands:
            try:
                command, value = pipe.recv()
            except EOFError:
                return
            if command == "close":
                return
            _answer(pipe, commands[command], value)


def _build(
    config: Config, folder: RunFolder, commands: dict[str, Callable[[Any], Any]], stack: contextlib.ExitStack
) -> Any:
    """Makes the rollouts, fills in what can be asked of them, returns their cursor."""
    from torl_mega.data.tokenizer import Tokenizer
    from torl_mega.rank0 import AsyncRunner, build_rollouts

    run = AsyncRunner(None)
    stack.callback(run.close)
    rollouts = build_rollouts(config, folder, Tokenizer(config.model.path), run, stack)
    commands["collect"] = lambda step: (rollouts.collect(step), rollouts.state())
    commands["evaluate"] = lambda step: dict(rollouts.evaluate(step))
    commands["restore"] = rollouts.restore
    return rollouts.state()


def _answer(pipe: Connection, command: Callable[[Any], Any], value: Any) -> None:
    try:
        pipe.send((True, command(value)))
    except TorlError as exc:
        pipe.send((False, exc))
