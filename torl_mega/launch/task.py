"""Stands in every task that srun starts: finds out which process of the placement it is, and runs that process.

    python -m torl_mega.launch.task prepare CONF [a.b=value …]            once, before anything is queued or started
    python -m torl_mega.launch.task rank|server|sandbox PLACEMENT CONF    in each task of a step

A task knows itself by SLURMD_NODENAME and SLURM_LOCALID. It takes its cores, starts the process and
watches it. `TORL_STATUS` is a folder shared by all tasks of one attempt; what happened is told there:

    stop          the job is to stop (written by the batch script or by a task that got SIGUSR1 or SIGTERM): every rank
                  gets SIGUSR1; whatever the ranks end with, the job is to be requeued
    hang          no sign of life from the run: every rank prints its stacks and ends
    end           the ranks have ended: side-cars stop
    rank_<i>      the exit code of a rank that failed; the others print their stacks and end some seconds later

Slurm signals every process of every step, side-cars and helpers too: they ignore SIGUSR1. A side-car
that ends by itself is started again, because a failed server is not a failed job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, TorlError
from torl_mega.launch.gpu_env import gpu_environment
from torl_mega.planner.placement import Placement, Process, read_placement
from torl_mega.process import start as process
from torl_mega.run.folder import RunFolder, lock_run, open_run

POLL_S = 0.5
PEER_GRACE_S = 20.0  # a rank whose peer failed may still end by its own error; then its stacks are taken
TELL_AGAIN_S = 10.0  # a rank that is still starting has no handler yet
STACKS_S = 2.0  # from SIGABRT to the end of faulthandler's print
RESTART_DELAY_S = 2.0
SIDECAR_GRACE_S = 3.0
MAX_RESTARTS = 20  # of one side-car; its own supervisor has restarted its server in place many times before
EXIT_REQUEUE, EXIT_PEER_FAILED, EXIT_HUNG = 85, 1, 128 + signal.SIGABRT


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args[:1] == ["prepare"] and len(args) > 1:
            return prepare(args[1], args[2:])
        if len(args) == 3 and args[0] in ("rank", "server", "sandbox"):
            return run_role(args[0], read_placement(args[1]), args[2], Path(os.environ["TORL_STATUS"]))
        print(__doc__, file=sys.stderr)
        return 2
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr, flush=True)
        return 1


def prepare(conf: str, overrides: Sequence[str]) -> int:
    """Opens the run folder, freezes the config as `jobs/config.<pid>.yaml` there, and prints both paths."""
    config = load_config(conf, overrides)
    folder = open_run(config)
    frozen = folder.path / "jobs" / f"config.{os.getpid()}.yaml"
    frozen.parent.mkdir(exist_ok=True)
    frozen.write_text(json.dumps(config.model_dump(mode="json"), indent=1))
    print(folder.path.resolve())
    print(frozen.resolve())
    return 0


def run_role(role: str, placement: Placement, conf: str, status: Path) -> int:
    """Runs this task's process; the exit code is the task's. A task beyond the placement has nothing to do."""
    host, local = _require("SLURMD_NODENAME"), int(_require("SLURM_LOCALID"))
    mine = next((p for p in placement.of(role) if p.host == host and p.local == local), None)
    if mine is None:
        if host not in placement.hosts:
            raise ConfigError(f"node {host} is not in the placement ({', '.join(placement.hosts)}); plan again")
        return 0
    _take_cores(mine, placement)
    config = load_config(conf)
    if placement.gpu != "cpu":
        os.environ.update(gpu_environment(config, os.environ))
    if role == "rank":
        return _run_rank(mine, placement, config, conf, status)
    return _run_sidecar(mine, placement, config, conf, status / "end")


def rank_environment(mine: Process, placement: Placement) -> dict[str, str]:
    """torchrun's names plus where servers and sandboxes are."""
    threads = 1 if placement.gpu == "cpu" else max(1, mine.cores[1] - mine.cores[0])
    return {
        "RANK": str(mine.index),
        "WORLD_SIZE": str(placement.world_size),
        "LOCAL_RANK": str(mine.local),
        "LOCAL_WORLD_SIZE": str(placement.ranks_per_node),
        "MASTER_ADDR": placement.hosts[0],
        "MASTER_PORT": str(placement.master_port),
        "TORL_SERVERS": ",".join(placement.server_urls),
        "TORL_SANDBOX": ",".join(placement.sandbox_urls),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONFAULTHANDLER": "1",  # SIGABRT prints the stack of every thread
    }


def sidecar_command(mine: Process, placement: Placement, config: Config, conf: str) -> list[str]:
    where = ["--host", mine.host, "--port", str(mine.port)]
    if mine.role == "sandbox":
        settings = ["--settings", config.sandbox.model_dump_json()]
        return [sys.executable, "-m", "torl_mega.sandbox.serve", *where, *settings]
    python = os.environ.get("TORL_SGLANG_PYTHON", sys.executable)  # SGLang's pins may need an environment of their own
    command = [python, "-m", "torl_mega.serving.serve", conf, *where]
    if placement.gpu != "cpu":
        command += ["--gpu-ids", ",".join(map(str, mine.gpus))]
    return command


def _run_rank(mine: Process, placement: Placement, config: Config, conf: str, status: Path) -> int:
    folder = RunFolder.of(config)
    lock = lock_run(folder) if mine.index == 0 else None
    env = {**os.environ, **rank_environment(mine, placement)}
    command = [sys.executable, "-m", "torl_mega.train", conf]
    # no reaper as for side-cars: it would cut a rank's saving short on SIGTERM, and Slurm ends the tree of a lost task
    child = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    received = _note_stop_signals(status / "stop")
    life = _SignOfLife(folder, config.cluster.hang_s) if mine.index == 0 else None
    try:
        return _watch_rank(child, mine, status, life, received)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if lock is not None:
            os.close(lock)


def _watch_rank(
    child: subprocess.Popen[bytes], mine: Process, status: Path, life: _SignOfLife | None, received: list[int]
) -> int:
    """Until the rank ends, a peer's failure has left it hanging, or the run shows no sign of life."""
    peer_failed_at: float | None = None
    tell_at = 0.0
    while (code := child.poll()) is None:
        time.sleep(POLL_S)
        if time.monotonic() > tell_at and (status / "stop").exists():
            by_slurm = tell_at == 0.0 and received  # which signals every process of a step, the rank too
            tell_at = time.monotonic() + TELL_AGAIN_S
            if not by_slurm:  # a second signal could meet the rank in its exit, past its handlers
                os.kill(child.pid, signal.SIGUSR1)
        if life is not None and life.is_over():
            print(
                f"torl: no sign of life for {life.limit_s:g} s; taking every rank's stacks", file=sys.stderr, flush=True
            )
            (status / "hang").touch()
        if (status / "hang").exists():
            _abort(child)
            return EXIT_HUNG
        if peer_failed_at is None and any(status.glob("rank_*")):
            peer_failed_at = time.monotonic()
        if peer_failed_at is not None and time.monotonic() - peer_failed_at > PEER_GRACE_S:
            failed = ", ".join(sorted(path.name for path in status.glob("rank_*")))
            print(
                f"torl: rank {mine.index} still waits though {failed} failed; its stacks:", file=sys.stderr, flush=True
            )
            _abort(child)
            return EXIT_PEER_FAILED
    if code not in (0, EXIT_REQUEUE):
        (status / f"rank_{mine.index}").write_text(f"{code}\n")
    return code if code >= 0 else 128 - code


def _run_sidecar(mine: Process, placement: Placement, config: Config, conf: str, end: Path) -> int:
    """Starts the side-car, and again whenever it ends, until the note `end` appears."""
    ending: list[int] = []  # on SIGTERM the job is about to end: what ends now is not started again
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited
    signal.signal(signal.SIGTERM, lambda number, _frame: ending.append(number))
    command = sidecar_command(mine, placement, config, conf)
    name = f"{mine.role}_{mine.index}"
    for _ in range(MAX_RESTARTS):
        child = process.start(command, name=name)
        while child.poll() is None and not end.exists():
            time.sleep(POLL_S)
        if end.exists() or ending:
            child.stop(SIDECAR_GRACE_S)
            return 0
        print(f"torl: {name} ended with code {child.poll()}; starting it again", file=sys.stderr, flush=True)
        time.sleep(RESTART_DELAY_S)
    print(f"torl: error: {name} ended {MAX_RESTARTS} times; see its log above", file=sys.stderr, flush=True)
    return 1


def _abort(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGABRT)
    deadline = time.monotonic() + STACKS_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def _note_stop_signals(note: Path) -> list[int]:
    """Turns stop signals into the note that every task of this attempt looks for; the list fills with those received."""
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        note.touch()

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, handle)
    return received


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


def _take_cores(mine: Process, placement: Placement) -> None:
    """Pins this task (and all it starts) to its cores where the node has given us all of them."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) >= placement.cores_per_node:
        os.sched_setaffinity(0, allowed[mine.cores[0] : mine.cores[1]])


def _require(variable: str) -> str:
    value = os.environ.get(variable)
    if value is None:
        raise ConfigError(f"{variable} is not set; this program is started by srun, see launch/common.sh")
    return value


if __name__ == "__main__":
    sys.exit(main())
