"""The fork server: one single-threaded process with the maths libraries imported, one confined child per snippet.

    pool ──SEQPACKET: {id, limits} + fds [payload, stdout, stderr (, fetch)]──► zygote ──fork──► child (a slot each)
    pool ◄─SEQPACKET: {id, wait status, wall, cpu, rss, why killed}──────────── zygote ◄─wait4── child

The zygote is trusted and holds no secret: it never reads a payload, and its environment is made for it. It owns the
clocks: wall time from the moment foreign code starts (a stamp on a pipe that the child closes first), CPU time from the
process clock. A snippet whose own time (clock.py) reaches 50 ms is reported; the pool may then set it aside (a priority that
sinks with the CPU time it has used) or hold it (SIGSTOP). End of file on the control socket, or SIGTERM, kills every child
and removes the scratch folder.
Tier A keeps one tiny init per slot, in a pid namespace of its own: the snippet joins it, so that signals it sends to
itself behave as anywhere (they would not for pid 1), and nobody else is there to be seen.
When idle for 1 ms the zygote pre-forks the next child, so an unloaded call waits for neither fork nor mounts.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from torl_mega.sandbox.jail import confine, linux, runner, scratch
from torl_mega.sandbox.jail.child import Job, run_in_child, send_job, wait_for_job
from torl_mega.sandbox.jail.clock import Clock
from torl_mega.sandbox.jail.pid_namespaces import PidNamespaces

_SETUP_S = 20.0  # from fork to the first line of foreign code, on a machine at its limit
_REAP_S = 0.3  # how long an answer waits for a killed child to be gone (freeing 65,000 maps takes a second)
_IDLE_MS = 1  # without an event, before a child is pre-forked
ASIDE_S = 0.05  # of its own time: several ordinary snippets need as much
_TICK_S = 0.1  # how often a running snippet's scratch folder is measured in tier B


@dataclass
class Child:
    id: int
    pid: int
    slot: int
    request: dict
    forked: float
    stamp_fd: int
    flags: mmap.mmap
    box: str | None
    fetch: bool  # the pool reads files out of the box, and says when it is done
    started: float | None = None
    trouble: str = ""
    answered: bool = False
    told: bool = False  # the pool knows that it takes longer
    clock: Clock | None = None  # of one that has run for a while
    killed: str = ""  # "wall", "cpu", "disk", "output", "cancel", "setup"


@dataclass
class Spare:
    """A pre-forked child: signals and mount are set up, and it waits for a job."""

    pid: int
    slot: int
    stamp_fd: int
    flags: mmap.mmap
    channel: socket.socket


class Zygote:
    def __init__(
        self,
        control: socket.socket,
        cage: confine.Cage,
        pid_namespaces: PidNamespaces | None,
        base: scratch.Base | None,
        procfs: int,
    ) -> None:
        self.control = control
        self.procfs = procfs
        self.cage = cage
        self.pid_namespaces = pid_namespaces
        self.free_slots = list(range(cage.settings.slots + confine.SPARE_SLOTS))
        self.children: dict[int, Child] = {}
        self.spare: Spare | None = None
        self.idle_ms = _IDLE_MS
        self.timers: list[tuple[float, int, int]] = []
        self.boxes: dict[int, str] = {}  # of ended snippets, while the pool reads files out of them
        self.ended = False
        self.own_pid = os.getpid()
        self.base = base

    # -------------------------------------------------------------------------------------------- the loop

    def serve(self) -> None:
        wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._stop)
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(wake_r, select.POLLIN)
        self._reap()  # what ended before the handler was there
        while not self.ended:
            poll.modify(self.control, select.POLLIN if self._has_room() else 0)
            timeout = max(0.0, self.timers[0][0] - time.monotonic()) * 1000 + 1 if self.timers else None
            may_pre_fork = self.spare is None and len(self.free_slots) > 0
            if may_pre_fork:
                timeout = min(timeout or self.idle_ms, self.idle_ms)
            events = dict(poll.poll(timeout))
            if may_pre_fork and not events:
                self._pre_fork()
            if wake_r in events:
                _drain(wake_r)
                self._reap()
            self._expire()
            if self.control.fileno() in events:
                if self._has_room():
                    self._receive()
                else:
                    self.ended = True  # nothing but a hang-up is reported now
        self._end()

    def _has_room(self) -> bool:
        return bool(self.free_slots or self.spare)

    def _stop(self, *_: object) -> None:
        self.ended = True

    def _end(self) -> None:
        for child in self.children.values():
            self._kill(child, "cancel")
        for pid in list(self.children):
            os.waitpid(pid, 0)
        if self.spare:
            os.kill(self.spare.pid, signal.SIGKILL)
            os.waitpid(self.spare.pid, 0)
        for pid in scratch.removers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if self.base:
            self.base.remove()

    def _receive(self) -> None:
        while self._has_room() and not self.ended:
            try:
                message, fds, _, _ = socket.recv_fds(self.control, 65536, 8)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                self.ended = True
                return
            request = json.loads(message)
            if "discard" in request:
                self._discard(request["discard"])
                continue
            if "do" in request:
                for child in [c for c in self.children.values() if c.id == request["do"]]:
                    self._obey(child, request["what"])
                continue
            try:
                self._spawn(request, fds)
            except OSError as e:
                self._send({"id": request["id"], "infra": f"the zygote could not start a snippet: {e}"})
            finally:
                for fd in fds:
                    os.close(fd)

    def _send(self, message: dict) -> None:
        data = json.dumps(message).encode()
        while True:
            try:
                self.control.send(data)
                return
            except BlockingIOError:
                select.select([], [self.control], [], 1.0)
            except OSError:
                self.ended = True
                return

    def _obey(self, child: Child, what: str) -> None:
        """The pool's word on one snippet: `aside`, `hold`, `go`, `look` (is it here still?), or why it is killed."""
        clock, now = child.clock, time.monotonic()
        if what == "aside" and clock:
            clock.set_aside(self.cage.niceness)
        elif what == "hold" and clock and not child.killed and clock.hold(now):
            os.kill(child.pid, signal.SIGSTOP)
        elif what == "go" and clock and clock.go(now):
            os.kill(child.pid, signal.SIGCONT)
        elif what == "look":
            self._send({"id": child.id, "here": True})
        elif what not in ("aside", "hold", "go"):
            self._kill(child, what)

    # -------------------------------------------------------------------------------------------- one snippet

    def _spawn(self, request: dict, fds: list[int]) -> None:
        slot = self.spare.slot if self.spare else self.free_slots[-1]
        box = self.base.make(self._slot_uid(slot)) if self.base else None
        job, now = Job(request, fds, box), time.monotonic()
        try:
            pid, stamp_fd, flags = self._take_spare(job) or self._fork(slot, lambda: job)
        except OSError:
            if self.base and box:
                self.base.discard(box)
            raise
        self.children[pid] = Child(request["id"], pid, slot, request, now, stamp_fd, flags, box, fetch=len(fds) > 3)
        first = min(request["wall_s"], request["cpu_s"], ASIDE_S)
        heapq.heappush(self.timers, (now + first, pid, request["id"]))

    def _fork(self, slot: int, get_job: Callable[[], Job]) -> tuple[int, int, mmap.mmap]:
        """A child in `slot`, which is no longer free: (pid, where its stamp is read, its flags)."""
        stamp_r, stamp_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        flags = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            if self.pid_namespaces:
                linux.setns(self.pid_namespaces.of(slot), linux.CLONE_NEWPID)
            pid = os.fork()
        except OSError:
            os.close(stamp_r)
            flags.close()
            raise
        else:
            if pid == 0:
                os.close(self.control.fileno())  # or the pool would take a waiting child for a living zygote
                run_in_child(self.cage, get_job, stamp_w, flags, slot, self.own_pid)
        finally:
            os.close(stamp_w)
        flags.madvise(mmap.MADV_DONTFORK)  # no later child may touch it
        self.free_slots.remove(slot)
        return pid, stamp_r, flags

    def _pre_fork(self) -> None:
        slot = self.free_slots[-1]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid, stamp_fd, flags = self._fork(slot, lambda: wait_for_job(theirs))
        except OSError:
            ours.close()
            self.idle_ms = 1000  # pre-forking is optional; the next snippet reports the error if it persists
        else:
            self.spare = Spare(pid, slot, stamp_fd, flags, ours)
        theirs.close()

    def _take_spare(self, job: Job) -> tuple[int, int, mmap.mmap] | None:
        """Gives the job to the pre-forked child. None when there is none, or it has died, which frees its slot."""
        spare, self.spare = self.spare, None
        if spare is None:
            return None
        try:
            send_job(spare.channel, job)
        except OSError:
            os.kill(spare.pid, signal.SIGKILL)
            os.waitpid(spare.pid, 0)
            self._forget(spare)
            return None
        spare.channel.close()
        return spare.pid, spare.stamp_fd, spare.flags

    def _forget(self, spare: Spare) -> None:
        spare.channel.close()
        os.close(spare.stamp_fd)
        spare.flags.close()
        self.free_slots.append(spare.slot)

    def _slot_uid(self, slot: int) -> int | None:
        """Whom the slot's scratch folder belongs to, where not to the zygote's own user."""
        settings = self.cage.settings
        return settings.slot_uids[slot] if settings.slot_uids and not settings.keep_euid else None

    def _read_stamp(self, child: Child) -> None:
        """Start time, written by trusted code and closed before foreign code runs; or what went wrong before."""
        if child.started is not None or child.trouble:
            return
        try:
            data = os.read(child.stamp_fd, 4096)
        except BlockingIOError:
            return
        if data[:1] == b"S":
            (child.started,) = struct.unpack("<d", data[1:9])
        else:
            child.trouble = data[1:].decode("utf-8", "replace")

    def _expire(self) -> None:
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            _, pid, request_id = heapq.heappop(self.timers)
            child = self.children.get(pid)
            if child is None or child.id != request_id:
                continue
            if child.killed:
                if child.killed != "setup" and not child.answered:
                    self._answer_early(child, now)
                continue
            again = self._check(child, now)
            if again is not None:
                heapq.heappush(self.timers, (again, pid, request_id))

    def _check(self, child: Child, now: float) -> float | None:
        """Kills a child that is over a limit, or returns the time of the next check."""
        self._read_stamp(child)
        if child.started is None:
            if now - child.forked > _SETUP_S:
                self._kill(child, "setup")
                return None
            return now + 0.02
        ran_s, cpu_s = now - child.started, _cpu_s(child.pid)
        if child.clock is None and ran_s >= min(ASIDE_S, child.request["wall_s"]):
            child.clock = Clock(child.pid, self.procfs, child.started, child.request["wall_s"])
        clock = child.clock
        wall_left = clock.left_s(now, cpu_s) if clock else child.request["wall_s"] - ran_s
        cpu_left = child.request["cpu_s"] - cpu_s
        if wall_left <= 0 or cpu_left <= 0:
            self._kill(child, "wall" if wall_left <= 0 else "cpu")
            return None
        wait = min(wall_left, max(cpu_left / (os.cpu_count() or 1), 0.01))
        if not child.told:
            until_told_s = ASIDE_S - (clock.own_s(now) if clock else ran_s)
            if until_told_s <= 0:
                child.told = True
                self._send({"id": child.id, "long": True})
            else:
                wait = min(wait, max(until_told_s, 0.01))
        elif clock:
            wait = min(wait, clock.sink(cpu_s))
        if self.base and child.box:
            settings = self.cage.settings
            if scratch.exceeds(child.box, settings.scratch_mb << 20, settings.scratch_inodes):
                self._kill(child, "disk")
                return None
            wait = min(wait, _TICK_S)
        return now + wait

    def _kill(self, child: Child, why: str) -> None:
        if not child.killed:
            child.killed = why
            heapq.heappush(self.timers, (time.monotonic() + _REAP_S, child.pid, child.id))
        with contextlib.suppress(ProcessLookupError):  # then the next reap tells how it ended
            os.kill(child.pid, signal.SIGKILL)

    def _reap(self) -> None:
        while not self.ended:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child is None and self.spare and pid == self.spare.pid:
                self._forget(self.spare)
                self.spare = None
                continue
            if child is None:
                if pid in scratch.removers:
                    scratch.removers.discard(pid)
                    continue
                self.ended = True  # a slot's init died, and with it their maker: this zygote can no longer isolate
                return
            self._finish(child, status, usage)

    def _finish(self, child: Child, status: int, usage: resource.struct_rusage) -> None:
        now = time.monotonic()
        self._read_stamp(child)
        os.close(child.stamp_fd)
        if child.clock:
            child.clock.close()
        memory_flag = child.flags[0] == runner.MEMORY_FLAG
        child.flags.close()
        self.free_slots.append(child.slot)
        if self.base and child.box:
            self.boxes[child.id] = child.box
            if not child.fetch:
                self._discard(child.id)
        if child.answered:
            return
        if child.started is None and child.killed != "cancel":
            self._send({"id": child.id, "infra": f"a snippet could not be set up: {child.trouble or 'it died'}"})
            return
        cpu = usage.ru_utime + usage.ru_stime
        self._answer(child, os.waitstatus_to_exitcode(status), memory_flag, now, cpu, usage.ru_maxrss)

    def _discard(self, request_id: int) -> None:
        for child in self.children.values():
            if child.id == request_id:  # answered early: it goes when the process is gone
                child.fetch = False
        box = self.boxes.pop(request_id, None)
        if self.base and box:
            self.base.discard(box)

    def _answer_early(self, child: Child, now: float) -> None:
        """Answers for a child that was killed and is not reaped yet: freeing its memory can take the kernel a second."""
        child.answered = True
        self._answer(child, -signal.SIGKILL, False, now, _cpu_s(child.pid), 0)

    def _answer(self, child: Child, code: int, memory: bool, now: float, cpu_s: float, rss_kb: int) -> None:
        self._send(
            {
                "id": child.id, "code": code, "killed": child.killed, "memory": memory,
                "wall_s": now - (child.started or now), "cpu_s": cpu_s, "rss_kb": rss_kb,
            }
        )  # fmt: skip


def _cpu_s(pid: int) -> float:
    try:
        return linux.process_cpu_s(pid)
    except OSError:
        return 0.0  # it has just ended


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        return
