"""What a task does with the process it looks after: which end of it is mended, which ends the run, and with which words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from torl_mega.config_file import load_config
from torl_mega.launch.task import last_words
from torl_mega.run.folder import lock_run, open_run

ENDS = """
import os, pathlib, signal, socket, sys
starts = pathlib.Path(sys.argv[1])
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
end = (sys.argv[3:] + ["stay"])[number]
if end == "ready":  # for as long as somebody has not seen it
    door = socket.create_server(sys.argv[2], family=socket.AF_UNIX)
    door.accept()
    os.unlink(sys.argv[2])
if end == "stay":
    starts.with_name("stays").touch()
    signal.pause()
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("its last word")
sys.exit(1)
"""
SIDECAR = """
import sys, pathlib
from torl_mega.launch import task
from torl_mega.planner.placement import Process
folder = pathlib.Path(sys.argv[1])
task.RESTART_DELAY_S, task.POLL_S, task.MAX_RESTARTS = 0.0, 0.02, 3
mine = Process(role="sandbox", index=0, node=0, host="x", local=0, gpus=(), cores=(0, 1), socket=str(folder / "s"))
command = [sys.executable, "-c", sys.argv[2], str(folder / "starts"), str(folder / "s"), *sys.argv[3:]]
sys.exit(task.run_sidecar(mine, command, None, folder / "status"))
"""
RANK = """
import sys, pathlib
from torl_mega.config_file import load_config
from torl_mega.launch import task
from torl_mega.planner.placement import Process
from torl_mega.run.folder import open_run
folder = pathlib.Path(sys.argv[1])
task.POLL_S, task.PEER_GRACE_S, task.RANK_GRACE_S = 0.02, 0.2, 0.2
mine = Process(role="rank", index=0, node=0, host="x", local=0, gpus=(), cores=(0, 1))
config = load_config("conf/quickstart.yaml", [f"runs_dir={folder}"])
open_run(config)
command = [sys.executable, "-X", "faulthandler", "-c", sys.argv[2]]
hang_s = float(sys.argv[3]) if sys.argv[3:] else None
sys.exit(task.run_rank(mine, command, None, folder / "status", config, hang_s=hang_s))
"""


@dataclass
class Task:
    folder: Path
    process: subprocess.Popen[bytes]

    def wait(self) -> int:
        return self.process.wait(30)

    def see(self, *names: str) -> None:
        """Returns when those files are there."""
        deadline = time.monotonic() + 30
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def note(self, name: str, text: str = "") -> None:
        (self.folder / "status" / name).write_text(text)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def task(tmp_path: Path) -> Iterator:
    """`task(program, argument, ...)` starts one whose output goes to `log`, which has old lines in it."""
    (tmp_path / "status").mkdir()
    (tmp_path / "log").write_text("torl: error: of an earlier run\n")
    started = []

    def start(program: str, *arguments: str) -> Task:
        with (tmp_path / "log").open("ab") as log:
            command = [sys.executable, "-c", program, str(tmp_path), *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        started.append(process)
        return Task(tmp_path, process)

    yield start
    for process in started:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------ side-cars


def test_a_killed_side_car_is_started_again_however_the_next_one_ends(task) -> None:
    car = task(SIDECAR, ENDS, "killed", "fails", "killed")
    car.see("stays")
    assert car.log.count("starting it again") == 3
    assert "torl: sandbox_0 was killed by SIGKILL; starting it again" in car.log
    assert "torl: sandbox_0 ended with code 1; starting it again" in car.log
    car.note("end")
    assert car.wait() == 0


def test_one_that_was_ready_before_is_started_again(task) -> None:
    car = task(SIDECAR, ENDS, "ready")
    car.see("stays")
    assert "torl: sandbox_0 ended with code 1; starting it again" in car.log
    car.process.terminate()
    assert car.wait() == 0


def test_one_that_ends_by_itself_before_it_was_ready_ends_the_run(task) -> None:
    car = task(SIDECAR, ENDS, "fails")
    assert car.wait() == 1
    words = [f"torl: error: sandbox_0 ended with code 1: its last word (log: {car.folder}/log)"]
    assert last_words(car.folder / "status") == words
    assert len((car.folder / "starts").read_text()) == 1


def test_restarts_are_bounded(task) -> None:
    car = task(SIDECAR, ENDS, *["killed"] * 9)
    assert car.wait() == 1
    assert len((car.folder / "starts").read_text()) == 4
    assert "sandbox_0 was killed by SIGKILL" in last_words(car.folder / "status")[0]


# ---------------------------------------------------------------------------------------------------- ranks

STAYS = "import signal; signal.signal(signal.SIGUSR1, lambda *_: exit(85)); print('up', flush=True); signal.pause()"


def up(rank: Task) -> Task:
    deadline = time.monotonic() + 30
    while "up\n" not in rank.log:
        assert rank.process.poll() is None, rank.log
        assert time.monotonic() < deadline, rank.log
        time.sleep(0.01)
    return rank


def test_the_note_stop_is_handed_to_the_rank_as_sigusr1(task) -> None:
    rank = up(task(RANK, STAYS))
    rank.note("stop")
    assert rank.wait() == 85
    assert not list((rank.folder / "status").glob("rank_*"))


def test_a_signal_to_the_task_is_noted_for_everybody(task) -> None:
    rank = up(
        task(
            RANK, "import signal; signal.signal(signal.SIGTERM, lambda *_: 0); print('up', flush=True); signal.pause()"
        )
    )
    rank.process.terminate()
    rank.see("status/stop")
    rank.note("failed")
    rank.wait()


@pytest.mark.parametrize(
    ("note", "code"), [("failed", 1), ("lost", 128 + signal.SIGKILL), ("hang", 128 + signal.SIGABRT), ("rank_1", 1)]
)
def test_notes_end_the_rank(task, note: str, code: int) -> None:
    rank = up(task(RANK, STAYS))
    rank.note(note)
    assert rank.wait() == code
    stacks = note in ("hang", "rank_1")
    assert ("Fatal Python error: Aborted" in rank.log) == stacks, rank.log


def test_a_run_without_a_sign_of_life_ends_with_its_stacks(task) -> None:
    rank = task(RANK, STAYS, "1")
    assert rank.wait() == 128 + signal.SIGABRT
    assert "torl: no sign of life for 1 s" in rank.log
    assert "Fatal Python error: Aborted" in rank.log
    assert (rank.folder / "status/hang").exists()


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("print('torl: error: a reason', flush=True); print('more'); exit(1)", 1, "torl: error: a reason"),
        ("print('a traceback'); exit(3)", 3, "torl: error: rank_0 ended with code 3: a traceback (log: "),
        ("import os; os.kill(os.getpid(), 9)", 137, ""),
        ("exit(85)", 85, ""),
    ],
)
def test_what_a_rank_ended_with_is_noted(task, program: str, code: int, words: str) -> None:
    rank = task(RANK, program)
    assert rank.wait() == code
    said = last_words(rank.folder / "status")
    assert len(said) == bool(words)
    assert "".join(said).startswith(words)
    assert (rank.folder / "status/rank_0").exists() == (code != 85)


def test_a_run_that_another_process_holds_is_left_alone(tmp_path: Path, task) -> None:
    folder = open_run(load_config("conf/quickstart.yaml", [f"runs_dir={tmp_path}"]))
    lock = lock_run(folder)
    rank = task(RANK, "exit(0)")
    assert rank.wait() == 1
    assert "is in use by another process" in rank.log
    os.close(lock)
