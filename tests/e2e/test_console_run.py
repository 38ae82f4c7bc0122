"""A real run on a terminal: what is seen while it starts and works, and what Ctrl-C does."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from pathlib import Path

import pyte
import pytest
from torl_runs import command, processes_of, torl, wait_until_gone

WIDTH = 90
ANSWER_S, END_S = 1.0, 20.0  # what a user is promised after Ctrl-C


class Terminal:
    """A command in a pty of its own, as if typed."""

    def __init__(self, cmd: list[str]) -> None:
        self.sent = b""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            name = next(word for word in cmd if word.startswith("name="))
            os.execve(cmd[0], cmd, {**os.environ, "TERM": "xterm-256color", "TORL_TEST_RUN": name})
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))

    def read_until(self, pattern: str, limit_s: float, begin: int = 0) -> float:
        """Seconds until what was sent after `begin` matches."""
        started = time.monotonic()
        while not re.search(pattern.encode(), self.sent[begin:]):
            assert time.monotonic() - started < limit_s, (pattern, self.sent[-3000:])
            assert self._more(), (pattern, self.sent[-3000:])
        return time.monotonic() - started

    def press_ctrl_c(self) -> int:
        """Returns how much had been sent before."""
        before = len(self.sent)
        os.write(self._fd, b"\x03")
        return before

    def end(self, limit_s: float) -> tuple[int, float]:
        """Exit code and seconds until then."""
        started = time.monotonic()
        while self._more():
            if time.monotonic() - started > limit_s:
                os.kill(self.pid, signal.SIGKILL)
        took = time.monotonic() - started
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), took

    def screen(self) -> list[str]:
        screen = pyte.Screen(WIDTH, 50)
        pyte.ByteStream(screen).feed(self.sent)
        return [line.rstrip() for line in screen.display if line.strip()]

    def _more(self) -> bool:
        if not select.select([self._fd], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # nobody holds the other side any more
            return False
        self.sent += data
        return bool(data)


def interrupted(verb: str, runs: Path, name: str, at: str, *overrides: str, twice: bool = False) -> Terminal:
    """Presses Ctrl-C once `at` is on the screen; asserts what a user is promised."""
    terminal = Terminal(command(verb, runs, name, *overrides))
    terminal.read_until(at, 200)
    begin = terminal.press_ctrl_c()
    assert terminal.read_until("SIGINT: stopping", 10, begin) <= ANSWER_S
    if twice:
        terminal.press_ctrl_c()
    code, took = terminal.end(60)
    assert (code, took <= (6 if twice else END_S)) == (85, True), (code, took, terminal.sent[-3000:])
    assert not re.search("trajectories|starting  ", terminal.screen()[-1])
    wait_until_gone(f"name={name}")
    return terminal


def test_ctrl_c_while_the_servers_start(tmp_path: Path) -> None:
    terminal = interrupted("train", tmp_path, "start", r"starting  [3-9] s")
    assert terminal.screen()[0].startswith("start: 1 rank, 1 server, 1 sandbox on CPU cores")
    assert "no step was begun" in " ".join(terminal.screen())


@pytest.mark.slow
def test_a_run_is_interrupted_in_the_rollout_and_goes_on(tmp_path: Path) -> None:
    sizes = ("rollout.group_size=64", "trainer.mini_batch_samples=256", "eval.data=[]")
    terminal = interrupted("train", tmp_path, "run", r"step 2/3  ETA [\d:]+  \d+/256 trajectories", *sizes)
    screen = terminal.screen()
    for words in ("trainer ready after", "server_0 ready after", "weights sent and verified", "step    1/3"):
        assert any(words in line for line in screen), words
    assert (tmp_path / "run/checkpoints/step_00001").is_dir()
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    assert "step    1/3" in log

    done = torl("train", tmp_path, "run", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert (events[0]["event"], events[-1]["event"]) == ("header", "end")
    assert next(e for e in events if e.get("what") == "trainer")["steps_done"] == 1
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2]
    assert events[-1]["summary"]["steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "at"),
    [("train", "evaluation  "), ("train", "training|weight sync"), ("eval", r"starting  [3-9] s"), ("eval", "evaluation  "),
     ("rollout", r"step 1/3  \d+/")],
)  # fmt: skip
def test_ctrl_c_in_every_phase(tmp_path: Path, verb: str, at: str) -> None:
    interrupted(verb, tmp_path, f"{verb}_{len(at)}", at)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    interrupted("train", tmp_path, "twice", r"step 1/3  \d+/", "rollout.group_size=64",
                "trainer.mini_batch_samples=256", twice=True)  # fmt: skip
    assert not processes_of("name=twice")
