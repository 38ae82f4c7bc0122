"""Stands in every task of a run, started by srun or `torl train`: finds out which process it is, starts and watches it.

    python -m torl_mega.launch.task runs_dir CONF [a.b=value …]           says where the run folder will be
    python -m torl_mega.launch.task prepare ROLE CONF [a.b=value …]       once, before anything is queued or started
    python -m torl_mega.launch.task ROLE PLACEMENT CONF                   ROLE: server, sandbox or one of PROGRAMS

A task knows itself by its node and its number there (TORL_NODE and TORL_LOCAL_ID, or SLURMD_NODENAME and SLURM_LOCALID).
It takes its cores, makes a folder for temporary files (TMPDIR), starts the process, and tells the others what happened
in `TORL_STATUS`, a folder of all tasks of one attempt:

    stop          the run is to stop (written by the launcher or by a task that got SIGUSR1 or SIGTERM): every rank gets
                  SIGUSR1; whatever the ranks end with, the run is to be continued later
    hang          no sign of life from the run: every rank prints its stacks and ends
    end           the ranks have ended: side-cars stop
    rank_<i>      a rank failed: its exit code and last words; the others print their stacks and end some seconds later
    failed        a side-car cannot be had, in one line: the ranks end, the run with code 1
    lost          a side-car's task was killed (written by the launcher): the ranks end and are started again with all

A side-car that a signal ended, or that was ready before, is started again in its place, at most MAX_RESTARTS times: a
failed server is not a failed run. One that ends by itself before it was ever ready has said why: `failed`.
Slurm signals every process of every step, side-cars and helpers too: they ignore SIGUSR1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, TorlError
from torl_mega.launch.commands import PROGRAMS, command, environment
from torl_mega.launch.cores import pin, read_topology
from torl_mega.launch.inputs import EVALUATED, check_program, freeze, without_trainer
from torl_mega.planner.placement import Placement, Process, read_placement
from torl_mega.process import exit_codes
from torl_mega.process.exit_codes import MAX_RESTARTS, as_shell_code, how_it_ended
from torl_mega.process.start import GuardedProcess, short_tempdir, start, tail
from torl_mega.process.stop_flag import StopFlag
from torl_mega.process.temporary import temporary_folder
from torl_mega.run.folder import RunFolder, lock_run, open_run

POLL_S = 0.5
PEER_GRACE_S = 20.0  # a rank whose peer failed may still end by its own error; then its stacks are taken
TELL_AGAIN_S = 10.0  # a rank that is still starting has no handler yet
STACKS_S = 2.0  # from SIGABRT to the end of faulthandler's print
RESTART_DELAY_S = 2.0
SIDECAR_GRACE_S = 3.0
RANK_GRACE_S = 5.0  # for a rank that cannot go on
LONGEST_TEMPDIR = 78  # with room for our own folder and a socket in it
ERROR_MARK = "torl: error: "
TRAINS = ("rank", "pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args[:1] == ["runs_dir"] and len(args) > 1:
            print(Path(load_config(args[1], args[2:]).runs_dir).resolve())
            return exit_codes.DONE
        if args[:1] == ["prepare"] and len(args) > 2:
            return prepare(args[1], args[2], args[3:])
        if len(args) == 3 and args[0] in (*PROGRAMS, "server", "sandbox"):
            return run_role(args[0], read_placement(args[1]), args[2], Path(os.environ["TORL_STATUS"]))
        print(__doc__, file=sys.stderr)
        return 2
    except TorlError as exc:
        print(f"{ERROR_MARK}{exc}", file=sys.stderr, flush=True)
        return exit_codes.ERROR


def prepare(role: str, conf: str, overrides: Sequence[str]) -> int:
    """Opens the run folder, freezes the config as `jobs/config.<pid>.yaml` there, and prints both paths."""
    config = load_config(conf, overrides)
    check_program(role, config)
    config = config if role in TRAINS else without_trainer(config)
    folder = open_run(config, free=EVALUATED if role == "eval" else frozenset())
    print(folder.path.resolve())
    print(freeze(config, folder, f"config.{os.getpid()}"))
    return exit_codes.DONE


def run_role(role: str, placement: Placement, conf: str, status: Path) -> int:
    """Runs this task's process; the exit code is the task's. A task beyond the placement has nothing to do."""
    host, local = this_task()
    roles = placement.of("rank" if role in PROGRAMS else role)
    mine = next((p for p in roles if p.host == host and p.local == local), None)
    if mine is None:
        if host not in placement.hosts:
            raise ConfigError(f"node {host} is not in the placement ({', '.join(placement.hosts)}); plan again")
        return exit_codes.DONE
    _take_cores(mine, placement)
    config = load_config(conf)
    with temporary_folder(short_tempdir(LONGEST_TEMPDIR)) as (scratch, lock):
        os.chmod(scratch, 0o711)  # a sandbox in it runs snippets as other users
        env = {**os.environ, **environment(mine, placement, config), "TMPDIR": scratch}
        cmd = command(role, mine, placement, config, conf, status.parent)
        if role in PROGRAMS:
            hang_s = config.cluster.hang_s if role in TRAINS else None
            return run_rank(mine, cmd, env, status, config, hang_s=hang_s, keep=(lock,))
        return run_sidecar(mine, cmd, env, status)


def this_task() -> tuple[str, int]:
    """The node of this task and its number among its role's there. Raises ConfigError outside of a task."""
    for node, local in (("TORL_NODE", "TORL_LOCAL_ID"), ("SLURMD_NODENAME", "SLURM_LOCALID")):
        if node in os.environ and local in os.environ:
            return os.environ[node], int(os.environ[local])
    raise ConfigError(
        "SLURMD_NODENAME and SLURM_LOCALID are not set; this program is started by srun (launch/common.sh) or `torl train`"
    )


# ---------------------------------------------------------------------------------------------------- ranks


def run_rank(
    mine: Process, cmd: list[str], env: dict[str, str], status: Path, config: Config, *,
    hang_s: float | None, keep: Sequence[int] = (),
) -> int:  # fmt: skip
    """`keep`: descriptors that the rank inherits, and so keeps open where this task is killed."""
    folder = RunFolder.of(config)
    lock = lock_run(folder) if mine.index == 0 and "TORL_NODE" not in os.environ else None  # else the launcher holds it
    # no reaper as for side-cars: it would cut a rank's saving short on SIGTERM, and Slurm ends the tree of a lost task
    child = subprocess.Popen(cmd, env=env, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=keep)
    stop = StopFlag()
    stop.on_request = (status / "stop").touch
    life = _SignOfLife(folder, hang_s) if mine.index == 0 and hang_s is not None else None
    try:
        return _watch_rank(child, mine, status, life, stop)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if lock is not None:
            os.close(lock)


def _watch_rank(
    child: subprocess.Popen[bytes], mine: Process, status: Path, life: _SignOfLife | None, stop: StopFlag
) -> int:
    """Until the rank ends, a peer's failure has left it hanging, the run cannot go on, or it shows no sign of life."""
    log = _OwnLog()
    peer_failed_at: float | None = None
    tell_at = 0.0
    while (code := _ended(child, POLL_S)) is None:
        if time.monotonic() > tell_at and (status / "stop").exists():
            by_slurm = tell_at == 0.0 and stop.requested  # which signals every process of a step, the rank too
            tell_at = time.monotonic() + TELL_AGAIN_S
            if not by_slurm:  # a second SIGUSR1 would kill a rank that is exiting and has restored the default handler
                child.send_signal(signal.SIGUSR1)
        if life is not None and life.is_over():
            _say(f"torl: no sign of life for {life.limit_s:g} s; taking every rank's stacks")
            (status / "hang").touch()
        if (status / "hang").exists():
            _end(child, signal.SIGABRT, STACKS_S)
            return as_shell_code(-signal.SIGABRT)
        if (status / "failed").exists():
            _end(child, signal.SIGTERM, RANK_GRACE_S)
            return exit_codes.ERROR
        if (status / "lost").exists() and not (status / "stop").exists():
            _say("torl: a side-car's task was killed; ending the ranks")
            _end(child, signal.SIGTERM, RANK_GRACE_S)
            return as_shell_code(-signal.SIGKILL)
        if peer_failed_at is None and any(status.glob("rank_*")):
            peer_failed_at = time.monotonic()
        if peer_failed_at is not None and time.monotonic() - peer_failed_at > PEER_GRACE_S:
            failed = ", ".join(sorted(path.name for path in status.glob("rank_*")))
            _say(f"torl: rank {mine.index} still waits though {failed} failed; its stacks:")
            _end(child, signal.SIGABRT, STACKS_S)
            return exit_codes.ERROR
    if code not in (exit_codes.DONE, exit_codes.REQUEUE):
        (status / mine.name).write_text(f"{code}\n" + ("" if code < 0 else log.last_words(mine, code)))
    return as_shell_code(code)


def _end(child: subprocess.Popen[bytes], number: signal.Signals, grace_s: float) -> None:
    """Signals the rank and waits for its end; what still runs then is killed by `run_rank`."""
    child.send_signal(number)
    _ended(child, grace_s)


class _SignOfLife:
    """Time since anything in the run folder was last written, looked up now and then."""

    def __init__(self, folder: RunFolder, limit_s: float) -> None:
        self._folder, self.limit_s = folder, limit_s
        self._started = time.time()
        self._next = time.monotonic()

    def is_over(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + min(60.0, self.limit_s / 4)
        return time.time() - max(self._started, self._newest()) > self.limit_s

    def _newest(self) -> float:
        places = (self._folder.metrics, self._folder.path / "eval", self._folder.trajectories, self._folder.checkpoints)
        files = [file for place in places for file in (place, *(place.glob("**/*") if place.is_dir() else ()))]
        times = []
        for file in files:
            with contextlib.suppress(OSError):  # not there yet, or just removed
                times.append(file.stat().st_mtime)
        return max(times, default=0.0)


# ------------------------------------------------------------------------------------------------ side-cars


def run_sidecar(mine: Process, cmd: list[str], env: dict[str, str], status: Path) -> int:
    """Keeps the side-car running until the note `end` or a SIGTERM: then the run or the job is about to end."""
    stop = StopFlag(signal.SIGTERM)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited
    log, was_ready = _OwnLog(), False
    for left in reversed(range(MAX_RESTARTS + 1)):
        try:
            started = start(cmd, name=mine.name, env=env)
        except FileNotFoundError as exc:  # TORL_SGLANG_PYTHON names none
            return _give_up(status, f"{ERROR_MARK}{mine.name} could not be started: {exc}")
        with started as child:
            while (code := _ended(child, POLL_S)) is None and not stop.requested and not (status / "end").exists():
                if not was_ready and _is_ready(mine):
                    was_ready = True
                    (status / f"{mine.name}.ready").touch()
            if code is None or stop.requested or (status / "end").exists():
                child.stop(SIDECAR_GRACE_S)
                return exit_codes.DONE
        if not left or (code >= 0 and not was_ready):
            return _give_up(status, log.last_words(mine, code))
        was_ready = True  # or a signal ended it, which says nothing against the next one
        _say(f"torl: {mine.name} {how_it_ended(code)}; starting it again")
        time.sleep(RESTART_DELAY_S)
    raise AssertionError("the last start returns")


def _give_up(status: Path, words: str) -> int:
    """Notes for everybody why the run cannot go on."""
    (status / "failed").write_text(words)
    _say(words)
    return exit_codes.ERROR


def _is_ready(mine: Process) -> bool:
    """True when a server says so, and when a sandbox listens."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX if mine.socket else socket.AF_INET) as probe:
        probe.settimeout(POLL_S)
        probe.connect(mine.socket or (mine.reached_at, mine.port))
        if mine.role == "sandbox":
            return True
        probe.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
        return b" 200 " in probe.recv(32)
    return False


# --------------------------------------------------------------------------------------------- last words


class _OwnLog:
    """The file that this task and its process write to, from now on; nothing where their output goes to a pipe."""

    def __init__(self) -> None:
        ours = Path("/proc/self/fd/1").resolve()
        self._path = ours if ours.is_file() else Path(os.devnull)
        self._begin = self._path.stat().st_size

    def last_words(self, mine: Process, code: int) -> str:
        """The error that the process said last, or how it ended and its last line."""
        lines = tail(self._path, 1000, begin=self._begin).splitlines()
        errors = [line for line in lines if line.startswith(ERROR_MARK)]
        last = lines[-1] if lines else "no output"
        if errors and mine.role == "server":  # what SGLang said before we gave it up is the reason
            said = next((line for line in reversed(lines) if line.strip() and line not in errors), "no output")
            return f"{errors[-1]}; it said last: {said.strip()[:300]} (log: {self._path})"
        return (errors or [f"{ERROR_MARK}{mine.name} {how_it_ended(code)}: {last} (log: {self._path})"])[-1]


def last_words(status: Path) -> list[str]:
    """Why the run ended, each reason once: what a side-car could not do, or else what the ranks said."""
    notes = [status / "failed"] if (status / "failed").exists() else sorted(status.glob("rank_*"))
    lines = [line for note in notes for line in note.read_text().splitlines() if line.startswith(ERROR_MARK)]
    return list(dict.fromkeys(lines))


# --------------------------------------------------------------------------------------------- small things


def _ended(child: subprocess.Popen[bytes] | GuardedProcess, within_s: float) -> int | None:
    """The child's exit code, or None when it still runs after that time."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(within_s)
    return None


def _take_cores(mine: Process, placement: Placement) -> None:
    """Pins this task (and all it starts) to cores near its GPU, or to its block, where the node has given us all of them."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < placement.cores_per_node:
        return
    topology = read_topology(allowed) if placement.gpu != "cpu" else None
    near = pin([p for p in placement.processes if p.host == mine.host], topology) if topology else None
    os.sched_setaffinity(0, near[mine.name] if near else allowed[mine.cores[0] : mine.cores[1]])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
