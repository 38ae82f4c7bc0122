"""Sampling ahead: a child process of rank 0 collects the next steps while the trainer updates. Implements `Collector`.

    rank 0 (trainer's GIL)                  child (rollouts' GIL)
      collect(s) ──────── batch s ◄──────── collected step s
         └─ requests s+1 … s+k ───────────► collects them one after another
      train on s  (meanwhile)               sampling
      sync s+1: k = 1: waits for step s+1 first, so each batch has one policy version (one-step-off)
                k > 1: servers pause, take the weights, go on; a trajectory then has several versions

Bound: step b is requested after sync b-k, so no token of it is older than b-k; the client refuses any other, and every
sample carries the version of each of its tokens. k is `rollout.max_staleness`.
Crash: a child that dies is replaced; the new one starts at the cursor of the last batch received and collects what was in
flight again, so no step is lost or trained twice.
Resume: batches that were collected but not trained are read back from the recorded trajectories, unfinished ones are
collected again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from torl_mega.config import Config
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import Preempted, StaleServers, TorlError
from torl_mega.process.exit_codes import MAX_RESTARTS
from torl_mega.process.start import die_with_parent
from torl_mega.process.stop_flag import StopFlag
from torl_mega.rollout.build import GC_THRESHOLDS, AsyncRunner, build_collector
from torl_mega.rollout.collector import LiveCollector
from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.rollout.samples import make_samples
from torl_mega.run.folder import RunFolder
from torl_mega.types import StepBatch

log = logging.getLogger(__name__)

POLL_S = 0.2
CLOSE_S = 10.0


class _ChildLost(Exception):
    """The child ended without an answer."""


class SamplingAhead:
    """The parent's half. `drain` must be called before a weight sync when `max_staleness` is 1."""

    def __init__(self, config: Config, folder: RunFolder, stop: StopFlag) -> None:
        self._config, self._folder, self._stop = config, folder, stop
        self._ready: dict[int, StepBatch] = {}
        self._cursor: Any = None  # after the last batch received
        self._next_to_request = 0  # a step
        self._in_flight: list[int] = []  # steps requested and not received, in order
        self._num_restarts = self._restarts_reported = 0
        self._start_child()
        try:
            self._cursor = self._receive()
        except _ChildLost as lost:
            raise TorlError(f"{lost} before it had sampled anything; see its traceback above") from None

    # ------------------------------------------------------------------------------------------------ Collector

    def collect(self, step: int) -> StepBatch:
        last_ahead = min(step + self._config.rollout.max_staleness, self._config.num_steps - 1)
        # the steps before it were trained, here or before a resume
        self._next_to_request = max(self._next_to_request, step)
        self._request_up_to(step)
        while step not in self._ready:
            self._receive_batch()
        self._request_up_to(last_ahead)
        return self._with_restarts(self._ready.pop(step))

    def evaluate(self, step: int) -> Mapping[str, float]:
        self.drain()
        return self._command("evaluate", step)

    def state(self) -> Mapping[str, Any]:
        # a failed step is requested again by the next `collect`, which raises
        with contextlib.suppress(StaleServers):
            while self._in_flight and self._pipe.poll():
                self._receive_batch()
        return {"cursor": self._cursor, "collected": {str(s): dict(b.metrics) for s, b in self._ready.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor = state["cursor"]
        self._command("restore", self._cursor)
        for step, metrics in sorted((int(s), m) for s, m in state["collected"].items()):
            groups = read_groups(step_path(self._folder.trajectories, step))
            self._ready[step] = StepBatch(tuple(make_samples(groups, self._config.algo)), metrics)

    # ------------------------------------------------------------------------------------------------ the child

    def drain(self) -> None:
        """Waits for all requested batches. One that failed with StaleServers is requested again by the next `collect`, after
        the sync the caller makes now."""
        with contextlib.suppress(StaleServers):
            while self._in_flight:
                self._receive_batch()

    def close(self) -> None:
        """Ends the child, by force after CLOSE_S."""
        self._send("close", None)
        self._child.join(CLOSE_S)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
        self._pipe.close()

    def _request_up_to(self, last: int) -> None:
        """Requests every step up to `last` that is neither ready nor in flight, in order."""
        first = max([self._next_to_request, *(s + 1 for s in self._ready)], default=0)
        for step in range(first, last + 1):
            self._send("collect", step)
            self._in_flight.append(step)
        self._next_to_request = max(first, last + 1)

    def _receive_batch(self) -> None:
        """Waits for the next batch in flight. Where the child died, replaces it and returns without one. Where the step
        failed, discards what was requested after it, so that both are requested again, and raises what the step raised."""
        step = self._in_flight[0]
        try:
            batch, cursor = self._receive()
        except _ChildLost as lost:
            self._replace_child(lost)
            return
        except TorlError:
            self._discard_in_flight()
            self._next_to_request = step
            self._command("restore", self._cursor)
            raise
        self._in_flight.pop(0)
        self._ready[step], self._cursor = batch, cursor

    def _discard_in_flight(self) -> None:
        """Discards the answers to all outstanding requests (the first was read already)."""
        waiting, self._in_flight = self._in_flight[1:], []
        for _ in waiting:
            with contextlib.suppress(TorlError, _ChildLost):  # the next command finds that the child is lost
                self._receive()

    def _command(self, name: str, value: Any) -> Any:
        """The child's answer to a command, given while nothing is in flight; a child that dies over it is replaced and asked
        again."""
        while True:
            self._send(name, value)
            try:
                return self._receive()
            except _ChildLost as lost:
                self._replace_child(lost)

    def _send(self, name: str, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # a lost child is noticed when its answer is awaited
            self._pipe.send((name, value))

    def _start_child(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (self._config, self._folder, theirs)
        self._child = context.Process(target=_serve, args=arguments, name="torl-rollouts", daemon=False)
        self._child.start()
        theirs.close()

    def _replace_child(self, lost: _ChildLost) -> None:
        """Starts a child at the cursor of the last batch received and requests again what was in flight."""
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
        new, self._restarts_reported = self._num_restarts - self._restarts_reported, self._num_restarts
        if not new:
            return batch
        return dataclasses.replace(batch, metrics={**batch.metrics, "faults/collector_restarted": float(new)})

    def _receive(self) -> Any:
        """The child's next answer. Raises what the child raised, `_ChildLost` when it ended, `Preempted` on a stop request."""
        while not wait([self._pipe, self._child.sentinel], timeout=POLL_S):
            if self._stop.requested:
                raise Preempted
        try:
            ok, value = self._pipe.recv()
        except (EOFError, OSError):  # OSError: it ended in the middle of an answer
            self._child.join(CLOSE_S)
            raise _ChildLost(f"the rollout process ended with code {self._child.exitcode}") from None
        if not ok:
            raise value
        return value


def _serve(config: Config, folder: RunFolder, pipe: Connection) -> None:
    """The child: answers with its cursor once it is built, then executes one command at a time, in order."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    die_with_parent(parent.pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides when to stop
    gc.set_threshold(*GC_THRESHOLDS)
    with contextlib.ExitStack() as stack:
        try:
            collector = _build(config, folder, stack)
        except TorlError as exc:
            pipe.send((False, exc))
            return
        pipe.send((True, collector.state()))
        verbs: dict[str, Callable[[Any], Any]] = {
            "collect": lambda step: (collector.collect(step), collector.state()),
            "evaluate": collector.evaluate,
            "restore": collector.restore,
        }
        while True:
            try:
                command, value = pipe.recv()
            except EOFError:
                return
            if command == "close":
                return
            try:
                answer = (True, verbs[command](value))
            except TorlError as exc:
                answer = (False, exc)
            pipe.send(answer)


def _build(config: Config, folder: RunFolder, stack: contextlib.ExitStack) -> LiveCollector:
    run = AsyncRunner(None)
    stack.callback(run.close)
    return build_collector(config, folder, Tokenizer(config.model.path), run, stack)
