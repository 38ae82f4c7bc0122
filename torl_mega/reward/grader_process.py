"""The grader process: checks answers in forked children that can be killed. Run as `python -m torl_mega.reward.grader_process`.

    Grader (trainer's event loop) ──stdin: one JSON request a line──►  this process  ──pipe──►  child, child, …
                                 ◄─stdout: one JSON reply a line────   (one thread)  ◄────────  (forked, import nothing)

Requests are `[id, answer, gold, problem]`, replies `[id, outcome]` with outcome `right`, `wrong`, `timeout` or `fault`;
`[id, gold]` asks whether a gold answer can be compared with at all. With `--function` they are `[id, trajectory]`, and the
outcome is what own.py says of it, `timeout` or `fault`. The first line says
`ready`, or why the function cannot be had.

Contract: every request gets exactly one reply. A child that runs past the limit is killed and its answer is a `timeout`.
A child that dies of itself has its answer tried once more in a fresh child. When that one dies too, of a crash or of its
memory limit, the answer did it and counts as `timeout`; when something killed it from outside, it is a `fault`.

An answer that has used `_ASIDE_CPU_S` of CPU time, or has waited for long, is set aside: it keeps running at low priority
while a fresh child takes its place, so hanging answers run into their limits side by side and never in a queue. Waiting
requests are served longest text first: what is likely to take long begins early, and its limit ends early.

The limit is wall-clock time, but no answer times out before it had `timeout_s / 10` seconds of CPU or three times
the limit, so a crowded machine does not turn ordinary answers into timeouts.

Limits: Linux (fork, /proc, prctl). The process ends, and its children with it, when its stdin closes or its parent dies.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import heapq
import json
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torl_mega.errors import ConfigError
from torl_mega.process.start import die_with_parent

_ASIDE_CPU_S = 0.02  # fifty times an ordinary answer; CPU time, because on a crowded machine ordinary ones wait longer
_ASIDE_WALL_S = 0.25
_ASIDE_NICE = 10
_MAX_ASIDE = 64
_RECYCLE_AFTER = 20_000  # sympy's caches grow for ever; a fresh fork starts with the warm ones again
_CPU_CLOCK = 2  # CPUCLOCK_SCHED, linux/posix-timers.h


@dataclass(slots=True)
class _Job:
    identity: int
    arguments: list[str]
    tries: int = 0


@dataclass(slots=True, eq=False)
class _Child:
    pid: int
    to_child: int
    from_child: int
    job: _Job | None = None
    started: float = 0.0
    cpu_at_start: float = 0.0
    buffer: bytes = b""
    num_done: int = 0
    aside: bool = False


@dataclass(slots=True)
class _Pool:
    workers: int
    timeout_s: float
    memory_mb: int
    judge: Callable[..., Any]  # of a request's arguments; what it returns is JSON
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    # a heap: longest first, then in order of arrival
    waiting: list[tuple[int, int, _Job]] = field(default_factory=list)
    children: list[_Child] = field(default_factory=list)
    dying: list[int] = field(default_factory=list)  # pids that were killed and must still be reaped
    pending: bytes = b""

    # ---------------------------------------------------------------- main loop

    def serve(self) -> None:
        """Serves requests until stdin closes or the parent is gone."""
        parent = os.getppid()
        os.set_blocking(0, False)
        self.selector.register(0, selectors.EVENT_READ, None)
        while True:
            self._assign()
            for key, _ in self.selector.select(timeout=self._wait_s()):
                if key.data is None:
                    if not self._read_requests():
                        return
                elif key.data in self.children:
                    self._read_outcome(key.data)
            self._watch_clocks()
            self._reap()
            if os.getppid() != parent:
                return

    def close(self) -> None:
        for child in list(self.children):
            self._kill(child)
        for pid in self.dying:
            os.waitpid(pid, 0)

    def _wait_s(self) -> float:
        """Seconds until `_watch_clocks` has something to do; at most 1, so that a parent that ended is noticed."""
        now, next_s = time.monotonic(), 0.05 if self.dying else 1.0
        for child in self.children:
            if child.job is not None:
                limit_s, again_s = (self.timeout_s, 0.05) if child.aside else (_ASIDE_CPU_S, _ASIDE_CPU_S)
                left_s = child.started + limit_s - now
                next_s = min(next_s, left_s if left_s > 0 else again_s)  # past it: looked at now and then
        return next_s

    def _read_requests(self) -> bool:
        try:
            data = os.read(0, 1 << 20)
        except BlockingIOError:
            return True
        if not data:
            return False
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            identity, *arguments = json.loads(line)
            self._enqueue(_Job(identity, arguments))
        return True

    def _enqueue(self, job: _Job) -> None:
        heapq.heappush(self.waiting, (-sum(map(len, job.arguments[:2])), job.identity, job))

    def _assign(self) -> None:
        """Gives waiting requests to idle children, forking one for each child that was set aside."""
        while self.waiting:
            child = next((c for c in self.children if c.job is None), None)
            if child is None:
                if sum(not c.aside for c in self.children) >= self.workers:
                    return
                child = self._fork()
            *_, job = heapq.heappop(self.waiting)
            job.tries += 1
            child.job, child.started, child.cpu_at_start = job, time.monotonic(), _cpu_s(child.pid)
            request = json.dumps(job.arguments).encode() + b"\n"
            try:
                _write_all(child.to_child, request)
            except BrokenPipeError:
                self._lost(child)

    def _read_outcome(self, child: _Child) -> None:
        data = os.read(child.from_child, 1 << 16)
        if not data:
            self._lost(child)
            return
        child.buffer += data
        if child.buffer.endswith(b"\n"):
            outcome, child.buffer = json.loads(child.buffer), b""
            self._done(child, outcome)

    def _done(self, child: _Child, outcome: Any) -> None:
        assert child.job is not None
        _reply(child.job, outcome)
        child.job, child.num_done = None, child.num_done + 1
        if child.aside or child.num_done >= _RECYCLE_AFTER:
            self._kill(child)

    def _lost(self, child: _Child) -> None:
        """The child died of itself: its answer is tried once more in another child."""
        job = child.job
        self._forget(child)
        with contextlib.suppress(ProcessLookupError):  # it has closed its pipe, so it is ending
            os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        if job is None:
            return
        if job.tries < 2:
            self._enqueue(job)
        else:
            _reply(job, "fault" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else "timeout")

    def _watch_clocks(self) -> None:
        now = time.monotonic()
        for child in [c for c in self.children if c.job is not None]:
            running_s = now - child.started
            if running_s <= _ASIDE_CPU_S:
                continue
            cpu_s = _cpu_s(child.pid) - child.cpu_at_start
            if running_s > self.timeout_s and (running_s > 3 * self.timeout_s or cpu_s >= self.timeout_s / 10):
                assert child.job is not None
                _reply(child.job, "timeout")
                child.job = None
                self._kill(child)
            elif (cpu_s > _ASIDE_CPU_S or running_s > _ASIDE_WALL_S) and not child.aside:
                if sum(c.aside for c in self.children) >= _MAX_ASIDE:
                    continue
                child.aside = True
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, child.pid, _ASIDE_NICE)

    # ---------------------------------------------------------------- children

    def _fork(self) -> _Child:
        request_read, request_write = os.pipe()
        outcome_read, outcome_write = os.pipe()
        own_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(own_pid)
            inherited = [fd for c in self.children for fd in (c.to_child, c.from_child)]
            for fd in (*inherited, request_write, outcome_read):
                os.close(fd)
            _child_main(request_read, outcome_write, self.memory_mb, self.judge)
        os.close(request_read)
        os.close(outcome_write)
        child = _Child(pid, request_write, outcome_read)
        self.children.append(child)
        self.selector.register(outcome_read, selectors.EVENT_READ, child)
        return child

    def _kill(self, child: _Child) -> None:
        """Kills a child. `_reap` collects it later: one that computes at low priority takes a while to end."""
        self._forget(child)
        os.kill(child.pid, signal.SIGKILL)
        self.dying.append(child.pid)

    def _forget(self, child: _Child) -> None:
        self.selector.unregister(child.from_child)
        self.children.remove(child)
        os.close(child.to_child)
        os.close(child.from_child)

    def _reap(self) -> None:
        self.dying = [pid for pid in self.dying if os.waitpid(pid, os.WNOHANG)[0] == 0]


def _child_main(request_fd: int, outcome_fd: int, memory_mb: int, judge: Callable[..., Any]) -> NoReturn:
    """Answers requests until the pipe closes."""
    if memory_mb:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (memory_mb << 20), used + (memory_mb << 20)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    requests = os.fdopen(request_fd, "rb")
    for line in requests:
        try:
            outcome = judge(*json.loads(line))
        except MemoryError:
            os._exit(1)  # what is left of this process is not to be trusted
        _write_all(outcome_fd, json.dumps(outcome).encode() + b"\n")
    os._exit(0)


def _answers(checker: str) -> Callable[..., str]:
    """The judge of answers. Whatever a check raises means that the answer could not be shown right."""
    from torl_mega.reward.answers.check import CHECKERS, is_readable, warm_up

    warm_up()
    grade = CHECKERS[checker]

    def judge(answer: str, gold: str | None = None, problem: str = "") -> str:
        try:
            return "right" if (is_readable(answer) if gold is None else grade(answer, gold, problem)) else "wrong"
        except MemoryError:
            raise
        except Exception:  # sympy raises everything there is on hostile input
            return "wrong"

    return judge


def _own(function: str) -> Callable[[str], Any]:
    """The judge that a user brings. Raises ConfigError."""
    from torl_mega.import_path import load
    from torl_mega.reward.own import judge_by

    return judge_by(load(function, "reward.function"))


def _reply(job: _Job, outcome: Any) -> None:
    _write_all(1, json.dumps([job.identity, outcome]).encode() + b"\n")


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _cpu_s(pid: int) -> float:
    """CPU time of a child, by the clock that clock_getcpuclockid(3) would name."""
    try:
        return time.clock_gettime((~pid << 3) | _CPU_CLOCK)
    except OSError:
        return float("inf")  # it has ended: its pipe is read as closed next


def main() -> None:
    parser = argparse.ArgumentParser(
        description="the grader process of torl_mega.reward.grader; speaks on stdin/stdout"
    )
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--checker", default="own")
    parser.add_argument("--function")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which closes this process in order
    try:
        judge = _own(args.function) if args.function else _answers(args.checker)
    except ConfigError as exc:
        _write_all(1, json.dumps(str(exc)).encode() + b"\n")
        raise SystemExit(1) from None
    gc.collect()
    gc.freeze()  # children share these pages
    pool = _Pool(workers=args.workers, timeout_s=args.timeout_s, memory_mb=args.memory_mb, judge=judge)
    try:
        _write_all(1, b'"ready"\n')
        pool.serve()
    except BrokenPipeError:
        pass  # the trainer is gone
    finally:
        pool.close()
    sys.stdout = None


if __name__ == "__main__":
    main()
