"""Which end of a side-car ends the run, and which does not."""

import sys

import pytest

from torl_mega.errors import ServerError
from torl_mega.launch.local import MAX_RESTARTS, SideCar

ENDS = """
import os, pathlib, signal, sys
starts = pathlib.Path(sys.argv[1])
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
end = (sys.argv[2:] + ["stay"])[number]
if end == "stay":
    signal.pause()
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("its last word")
sys.exit(1)
"""


@pytest.fixture
def sidecar(tmp_path):
    """`sidecar(end, ...)` -> one whose starts end so, one after another, and then stay."""
    started = []

    def start(*ends):
        command = [sys.executable, "-c", ENDS, str(tmp_path / "starts"), *ends]
        started.append(SideCar.start("car", command, tmp_path / "log"))
        return started[-1]

    yield start
    for car in started:
        car.stop()


def ended(car):
    car.process.wait(20)
    return car


def test_a_killed_one_is_started_again_however_the_next_one_ends(sidecar):
    car = sidecar("killed", "fails", "killed")
    for _ in range(3):
        ended(car).keep_up()
    car.keep_up()
    assert car.process.poll() is None
    assert car.num_restarts == 3


def test_one_that_ends_by_itself_ends_the_run(sidecar):
    with pytest.raises(ServerError, match="car ended with code 1: its last word"):
        ended(sidecar("fails")).keep_up()


def test_restarts_are_bounded(sidecar):
    car = sidecar("killed", "killed")
    ended(car).keep_up()
    car.num_restarts = MAX_RESTARTS
    with pytest.raises(ServerError, match="car ended with code -9"):
        ended(car).keep_up()
