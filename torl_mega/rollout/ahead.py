"""Sampling the next steps while the trainer updates: the rollouts live in a child process of rank 0.

    rank 0 (trainer's GIL)                 child (rollouts' GIL)
      collect(s) ──────── batch s ◄──────── collected step s
         └─ asks for s+1 … s+k ───────────► collects them one after another
      train on s  (meanwhile)               sampling
      sync s+1: k = 1: waits for step s+1 first, so each batch has one policy version (one-step-off)
                k > 1: servers pause, take the weights, go on; a trajectory then has several versions

A child that dies is replaced: the new one starts at the cursor of the last batch that came home and collects what was
under way again, so nothing is lost or trained twice.

Bound: step b is asked for after sync b-k, so no token of it is older than b-k; the client refuses any other, and every
sample carries the version of each of its tokens. Resume: batches that were collected but not trained are read back from
the recorded trajectories, unfinished ones are collected again; nothing is trained twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from torl_mega.config import Config
from torl_mega.errors import Preempted, StaleServers, TorlError
from torl_mega.process.exit_codes import MAX_RESTARTS
from torl_mega.process.start import die_with_parent
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.rollout.samples import make_samples
from torl_mega.run.folder import RunFolder
from torl_mega.types import StepBatch

log = logging.getLogger(__name__)

POLL_S = 0.2
CLOSE_S = 10.0


class _ChildLost(Exception):
    """The child ended without an answer."""


class OverlappedRollouts:
    """Implements `Rollouts`. `drain` must be called before a weight sync when `max_staleness` is 1."""

    def __init__(self, config: Config, folder: RunFolder, stop: StopFlag) -> None:
        self._config, self._folder, self._stop = config, folder, stop
        self._ready: dict[int, StepBatch] = {}
        self._cursor: Any = None  # after the last batch that came home
        self._asked = 0  # steps below it need not be asked for
        self._in_flight: list[int] = []
        self._num_restarts = self._restarts_told = 0
        self._start_child()
        try:
            self._cursor = self._receive()
        except _ChildLost as lost:
            raise TorlError(f"{lost} before it had sampled anything; see its traceback above") from None

    # ------------------------------------------------------------------------------------------------ Rollouts

    def collect(self, step: int) -> StepBatch:
        ahead = min(step + self._config.rollout.max_staleness, self._config.num_steps - 1)
        self._asked = max(self._asked, step)  # what lies before was trained, by this process or the one it resumes
        self._ask(step)
        while step not in self._ready:
            self._take()
        self._ask(ahead)
        return self._with_restarts(self._ready.pop(step))

    def evaluate(self, step: int) -> Mapping[str, float]:
        self.drain()
        return self._command("evaluate", step)

    def state(self) -> Mapping[str, Any]:
        with contextlib.suppress(StaleServers):  # the next `collect` asks again, and says so
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
        """Waits until nothing is being sampled. What could not be, for servers with other weights, is asked for again
        later: the sync that comes now gives them the policy's."""
        with contextlib.suppress(StaleServers):
            while self._in_flight:
                self._take()

    def close(self) -> None:
        self._send("close", None)
        self._child.join(CLOSE_S)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
        self._pipe.close()

    def _ask(self, last: int) -> None:
        """Everything up to `last` that is neither home nor under way, in order."""
        first = max([self._asked, *(s + 1 for s in self._ready)], default=0)
        for step in range(first, last + 1):
            self._send("collect", step)
            self._in_flight.append(step)
        self._asked = max(first, last + 1)

    def _take(self) -> None:
        """The next batch comes home, or the child is replaced and asked for it again. If the batch failed, what was asked
        for after it is dropped, to be asked for later."""
        step = self._in_flight[0]
        try:
            batch, cursor = self._receive()
        except _ChildLost as lost:
            self._replace_child(lost)
            return
        except TorlError:
            self._drop_in_flight()
            self._asked = step
            self._command("restore", self._cursor)
            raise
        self._in_flight.pop(0)
        self._ready[step], self._cursor = batch, cursor

    def _drop_in_flight(self) -> None:
        """The answer to the first one was taken; those to the others are waited for and thrown away."""
        waiting, self._in_flight = self._in_flight[1:], []
        for _ in waiting:
            with contextlib.suppress(TorlError, _ChildLost):  # a lost child is found by the next command
                self._receive()

    def _command(self, name: str, value: Any) -> Any:
        """Asks while nothing is in flight; asks the next child if this one is lost over it."""
        while True:
            self._send(name, value)
            try:
                return self._receive()
            except _ChildLost as lost:
                self._replace_child(lost)

    def _send(self, name: str, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # a lost child shows when its answer is awaited
            self._pipe.send((name, value))

    def _start_child(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (self._config, self._folder, theirs)
        self._child = context.Process(target=_serve, args=arguments, name="torl-rollouts", daemon=False)
        self._child.start()
        theirs.close()

    def _replace_child(self, lost: _ChildLost) -> None:
        """A new child at the cursor of the last batch that came home, asked for everything that was under way."""
        while True:
            self._num_restarts += 1
            if self._num_restarts > MAX_RESTARTS:
                raise TorlError(f"{lost}, {self._num_restarts} times in this run; resume from the checkpoint")
            log.warning("%s; starting another", lost)
            self._pipe.close()
            self._start_child()
            try:
                self._receive()
                self._send("restore", self._cursor)
                self._receive()
            except _ChildLost as again:
                lost = again
                continue
            break
        for step in self._in_flight:
            self._send("collect", step)

    def _with_restarts(self, batch: StepBatch) -> StepBatch:
        """The batch, with the children lost since the one before it in its metrics."""
        new, self._restarts_told = self._num_restarts - self._restarts_told, self._num_restarts
        if not new:
            return batch
        return dataclasses.replace(batch, metrics={**batch.metrics, "faults/collector_restarted": float(new)})

    def _receive(self) -> Any:
        """The child's next answer. What it raised is raised here; a stop request ends the wait."""
        while not wait([self._pipe, self._child.sentinel], timeout=POLL_S):
            if self._stop.requested:
                raise Preempted
        try:
            ok, value = self._pipe.recv()
        except (EOFError, OSError):  # OSError: in the middle of an answer
            self._child.join(CLOSE_S)
            raise _ChildLost(f"the rollout process ended with code {self._child.exitcode}") from None
        if not ok:
            raise value
        return value


def _serve(config: Config, folder: RunFolder, pipe: Connection) -> None:
    """The child: one command at a time, in order."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    die_with_parent(parent.pid)
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
    from torl_mega.rollout.build import AsyncRunner, build_rollouts

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
