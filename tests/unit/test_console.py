"""What a run looks like: on a terminal (a real pty, read by a terminal emulator), in a pipe, as JSON."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest

from torl_mega.launch.console import (
    Header,
    JsonLines,
    Pace,
    Plain,
    Rows,
    Voice,
    Watched,
    as_clock,
    fit,
    is_noise,
    live_parts,
    make_console,
)
from torl_mega.run.progress import Now, Progress, ToldTurns, read_progress
from torl_mega.serving.turns import Resident

SHOW = """
import sys, time
from torl_mega.launch.console import make_console
from torl_mega.run.progress import Now
console = make_console(sys.stdout, as_json=False)
def tick(done, phase="sample"):
    now = Now(phase, {"what": "step", "step": 0, "done": done, "total": 64, "tokens": 100 * done, "since": time.time() - 2,
                      "servers": 1, "of_servers": 2, "active": phase == "sample"})
    console.tick(now, (1, 2), (3, 30), 95.0)
console.say("header")
tick(10)
console.said(b"step    1/30  acc 0.1\\n")
console.said(b"[Gloo] Rank 0 is connected\\n")
tick(20)
console.warn("torl: SIGINT: stopping")
tick(33)
if "hold" in sys.argv: sys.exit()
console.end(0, None, __import__("pathlib").Path("x"))
console.out.write("$ ")
"""


def shown(columns: int, *words: str, **env: str) -> tuple[list[str], bytes]:
    """The screen after SHOW in a terminal of that width, without empty lines; and what was sent to it."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm-256color", "COLUMNS": "80", **env})  # a shell may say what is no longer so
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", SHOW, *words])
    sent = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if not more:
            break
        sent += more
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, sent
    screen = pyte.Screen(columns, 30)
    pyte.ByteStream(screen).feed(sent)
    return [line.rstrip() for line in screen.display if line.strip()], sent


@pytest.mark.parametrize("columns", [12, 40, 200])
def test_lines_stay_above_the_live_line_and_it_is_gone_at_the_end(columns: int) -> None:
    screen, sent = shown(columns)
    assert "".join(screen) == "headerstep    1/30  acc 0.1torl: SIGINT: stopping$"
    assert b"step 4/30" in sent
    screen, _ = shown(columns, "hold")
    assert screen[-1].startswith("step 4/30")
    assert len(screen[-1]) < columns


def test_a_wide_terminal_shows_all_of_it() -> None:
    (*_, last), _ = shown(200, "hold")
    for part in ("ETA 1:35", "33/64 trajectories", "tok/s", "servers 1/2", "━" * 10 + "─" * 10):
        assert part in last


@pytest.mark.parametrize(
    ("env", "live", "colour"), [({"TERM": "dumb"}, False, False), ({"NO_COLOR": "1"}, True, False)]
)
def test_terminals_that_can_do_less(env: dict[str, str], live: bool, colour: bool) -> None:
    _, sent = shown(80, **env)
    assert (b"trajectories" in sent, b"\x1b[1;36m" in sent) == (live, colour)
    assert live or b"\x1b" not in sent


def test_in_a_pipe_there_are_lines_only() -> None:
    out = io.TextIOWrapper(io.BytesIO())
    assert type(make_console(out, as_json=False)) is Plain


@pytest.mark.parametrize("width", [1, 9, 20, 50, 79, 300])
def test_what_is_most_important_is_kept_when_there_is_no_room(width: int) -> None:
    now = Now("sample", {**SAMPLING, "active": True})
    text = fit(live_parts(now, (1, 1), (0, 9), 60.0, 0.0), width)
    assert text.startswith("step 1/9")
    assert len(text) <= max(width, len("step 1/9"))


SAMPLING = {"what": "step", "step": 0, "done": 3, "total": 4, "tokens": 9, "since": 0.0, "servers": 1, "of_servers": 1}


def test_each_part_of_a_run_has_its_words() -> None:
    def line(now: Now) -> str:
        return "  ".join(live_parts(now, (1, 2), (2, 9), None, 7.0))

    assert line(Now()) == "starting  7 s  servers 1/2"
    assert line(Now("train", {**SAMPLING, "active": False})) == "step 3/9  training"
    assert line(Now("sample", {**SAMPLING, "active": False})) == "step 3/9  rollout"
    assert "training  3/4 trajectories" in line(Now("train", {**SAMPLING, "active": True}))
    assert line(Now("", {**SAMPLING, "what": "evaluation", "active": True})).startswith("evaluation  3/4")
    assert [as_clock(s) for s in (7.2, 750, 11100)] == ["0:07", "12:30", "3:05:00"]


def test_progress_is_what_was_noted(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == Now()
    progress = Progress(tmp_path, servers=lambda: (1, 2))
    progress.milestone("trainer", 3.21, steps_done=4)
    ToldTurns(Resident(), progress).sample()
    progress.begins("step", 4)
    with progress.sampling(2) as tell:
        tell(7)
        during = read_progress(tmp_path)
    assert during.phase == "sample"
    assert during.milestones == ({"what": "trainer", "after_s": 3.2, "steps_done": 4},)
    expected = {
        "what": "step",
        "step": 4,
        "done": 1,
        "total": 2,
        "tokens": 7,
        "servers": 1,
        "of_servers": 2,
        "active": True,
    }
    assert {k: v for k, v in during.sampling.items() if k != "since"} == expected
    assert read_progress(tmp_path).sampling["active"] is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["milestones.jsonl", "phase.json", "sampling.json"]


def test_a_run_does_not_need_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORL_PROGRESS", raising=False)
    for progress in (Progress.from_environment(), Progress(tmp_path / "gone")):
        progress.milestone("trainer", 1.0)
        progress.phase("train")
        with progress.sampling(1) as tell:
            tell(1)
    assert not list(tmp_path.iterdir())


def test_rows_are_told_once_whatever_a_resume_does_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = [json.dumps({"kind": "train", "step": n}) + "\n" for n in range(3)]
    path.write_text("".join(old))
    rows = Rows(path)
    assert rows.new() == []
    other = tmp_path / "cut"
    other.write_text("".join(old[:2]))
    other.replace(path)
    assert rows.new() == []
    with path.open("a") as out:
        out.write('{"kind": "eval", "step": 2}\n{"kind": "tra')
        out.flush()
        assert [row["kind"] for row in rows.new()] == ["eval"]
        out.write('in", "step": 2, "again": 1}\nno json\n')
        out.flush()
        assert rows.new() == [{"kind": "train", "step": 2, "again": 1}]


def test_the_rest_takes_as_long_as_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = Pace(10, done=4)
    pace.begins()
    assert pace.eta_s() is None
    clock[0] = 6.0
    pace.step(4)
    pace.begins()
    clock[0] = 8.0
    pace.step(5)
    clock[0] = 9.0
    assert pace.eta_s() == pytest.approx(4 * 4 - 1)


HEADER = Header("n", "runs/n", "train", "CPU cores", 1, 2, 1, 30, "runs/n/logs", None)


def test_json_is_one_object_a_line_with_these_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "summary.json").write_text('{"steps": 1}')
    console = make_console(sys.stdout, as_json=True)
    assert isinstance(console, JsonLines)
    console.header(HEADER)
    log, notes, status = tmp_path / "logs/rank_0.log", tmp_path / "notes", tmp_path / "status"
    notes.mkdir()
    status.mkdir()
    watched = Watched(tmp_path / "metrics.jsonl", 30, Voice(log, console), notes=notes)
    (status / "server_0.ready").touch()
    Progress(notes).milestone("trainer", 2.0, steps_done=0, checkpoint=None)
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 0, "reward": 0.5}\n{"kind": "eval", "step": 1}\n'
    )
    log.write_text("step 1/30\n")
    watched.look(status, num_servers=2)
    console.stop("SIGINT", "stopping")
    console.restart(137)
    console.end(0, None, tmp_path / "summary.json")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in said] == (
        ["header", "startup", "startup", "step", "evaluation", "stop", "restart", "end"]
    )
    assert set(said[0]) == {"event", *Header.__dataclass_fields__}
    assert set(said[1]) == {"event", "what", "after_s"}
    assert said[2] == {"event": "startup", "what": "trainer", "after_s": 2.0, "steps_done": 0, "checkpoint": None}
    assert said[3] == {"event": "step", "step": 0, "reward": 0.5}
    assert said[-1] == {"event": "end", "code": 0, "error": None, "folder": str(tmp_path), "summary": {"steps": 1}}


def test_rank_0_is_heard_line_by_line_and_errors_go_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "rank_0.log"
    log.write_text("of an earlier attempt\n")
    voice = Voice(log, Plain(sys.stdout))
    with log.open("a") as out:
        for part in ("step 1", "/30\n[Gloo] Rank 0 is connected to 0 peer ranks\ntorl: error: a\n", "cut off"):
            out.write(part)
            out.flush()
            voice.copy()
    voice.close(["torl: error: a", "torl: error: b"])
    said = capfd.readouterr()
    assert said.out == "step 1/30\ncut off\n"
    assert said.err == "torl: error: a\ntorl: error: b\n"
    assert voice.error == "b"
    assert "Gloo" in log.read_text()


def test_an_attempt_has_begun_with_its_first_step(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "metrics.jsonl", 3, Voice(tmp_path / "log", Plain(sys.stdout)), notes=tmp_path)
    turns = ToldTurns(Resident(), Progress(tmp_path))
    for told, begun in ((lambda: None, False), (turns.sync, False), (turns.sample, True), (turns.save, True)):
        told()
        watched.look(tmp_path, num_servers=1)
        assert watched.has_begun is begun


@pytest.mark.parametrize(
    ("line", "noise"),
    [
        (b"[W1127 20:22:11.5 ProcessGroupGloo.cpp:760] Warning: Unable to resolve hostname\n", True),
        (b"[rank0]:[W1127 20:22:11.5 x.cpp] y\n", True),
        (b"/x/torch/y.py:12: FutureWarning: z\n", True),
        (b"  warnings.warn(\n", True),
        (b"NCCL version 2.30.7+cuda13\n", True),
        (b"step    1/30  acc 0.1\n", False),
        (b"torl_mega.rollout: WARNING is said\n", False),
        (b"Waiting\n", False),
    ],
)
def test_noise_of_the_engines_is_known_by_its_form(line: bytes, noise: bool) -> None:
    assert is_noise(line) is noise
