"""What a user sees of a run: plain lines, on a terminal with a live line below them, or one JSON object a line.

    rank 0's log ──► lines          progress files ──► live line, start-up          metrics.jsonl ──► rows (JSON)

Contract: `Plain` writes what rank 0 said, unchanged. `Live` does so above a line that says how far the step is; it fits any
width, and is gone when `end` returns. `JsonLines` writes only objects with an `event`: header, startup, step, evaluation, sync,
restart, stop, result, end (docs/console.md). Errors go to stderr in all three. rich is imported when a live line is wanted.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from torl_mega.launch.task import ERROR_MARK
from torl_mega.run.progress import Now, read_progress

NOISE = re.compile(
    rb"\[Gloo\] Rank |(\[rank\d+\]:)?\[?[WI]\d{4} \d\d:|NCCL version |\s*warnings\.warn\(|.*(Future|User|Deprecation)Warning: "
)
"""Lines that torch, gloo, NCCL and Python's warnings write at every start; they stay in logs/rank_0.log."""
BAR = 20
WORDS = {"sample": "rollout", "train": "training", "sync": "weight sync", "save": "saving"}
EVENTS = {"train": "step", "eval": "evaluation"}  # what a row's kind is called; others by their kind


@dataclass(frozen=True, slots=True)
class Header:
    """What is started, and where it can be watched."""

    name: str
    folder: str
    program: str  # train, eval, rollout or try
    where: str  # e.g. "CPU cores"
    ranks: int
    servers: int
    sandboxes: int
    num_steps: int
    logs: str
    tensorboard: str | None

    def text(self) -> str:
        parts = {"rank": self.ranks, "server": self.servers, "sandbox": self.sandboxes}
        counted = ", ".join(f"{n} {role}{'s' if n > 1 else ''}" for role, n in parts.items() if n)
        watch = f"; curves: tensorboard --logdir {self.tensorboard}" if self.tensorboard else ""
        return f"{self.name}: {counted} on {self.where}; each one's log is in {self.logs}{watch}"


class Plain:
    """Lines on `out`, errors on stderr."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self._hides_noise = True

    def header(self, header: Header) -> None:
        self._hides_noise = header.program != "try"  # whose lines are a model's
        self.say(header.text())

    def startup(self, what: str, after_s: float, facts: Mapping[str, Any]) -> None:
        if "server" in what or "sandbox" in what:  # the rest rank 0 says itself
            self.say(f"{what} ready after {after_s:.0f} s")

    def said(self, line: bytes) -> None:
        """A line of rank 0's."""
        if not (self._hides_noise and is_noise(line)):
            self._write(line)

    def say(self, text: str) -> None:
        self._write(f"{text}\n".encode(errors="replace"))

    def warn(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def restart(self, code: int) -> None:
        self.warn(f"torl: a rank was killed (code {code}); the ranks start again from the last checkpoint")

    def stop(self, signal_name: str, text: str) -> None:
        self.warn(f"torl: {signal_name}: {text}")

    def row(self, row: Mapping[str, Any]) -> None: ...

    def tick(self, now: Now, servers: tuple[int, int], steps: tuple[int, int], eta_s: float | None) -> None: ...

    def say_unless_json(self, text: str) -> None:
        self.say(text)

    def result(self, path: Path) -> None:
        """The table that a command was asked for, to stdout."""
        print(path.read_text(), end="", flush=True)

    def end(self, code: int, error: str | None, summary: Path) -> None: ...

    def _write(self, line: bytes) -> None:
        self.out.flush()
        self.out.buffer.write(line)
        self.out.flush()


class Live(Plain):
    """A line below the others that is drawn anew on every `tick`."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console

        super().__init__(out)
        self._rich = Console(file=out, highlight=False)
        self._shown = ""  # what stands there now
        self._began = time.monotonic()

    def tick(self, now: Now, servers: tuple[int, int], steps: tuple[int, int], eta_s: float | None) -> None:
        from rich.text import Text

        width = (os.get_terminal_size(self.out.fileno()).columns or 80) - 1  # a full last column would wrap
        text = Text(
            fit(live_parts(now, servers, steps, eta_s, time.monotonic() - self._began), width), "bold cyan", end=""
        )
        text.truncate(width, overflow="ellipsis")
        if text.plain == self._shown:
            return
        self._clear()
        self._rich.print(text, end="", soft_wrap=True)
        self.out.flush()
        self._shown = text.plain

    def warn(self, text: str) -> None:
        self._clear()
        super().warn(text)

    def result(self, path: Path) -> None:
        self._clear()
        super().result(path)

    def end(self, code: int, error: str | None, summary: Path) -> None:
        self._clear()

    def _write(self, line: bytes) -> None:
        self._clear()
        super()._write(line)

    def _clear(self) -> None:
        if self._shown:
            self.out.write("\r\x1b[2K")
            self.out.flush()
            self._shown = ""


class JsonLines(Plain):
    """One object a line, and nothing else."""

    def header(self, header: Header) -> None:
        self.event("header", asdict(header))

    def startup(self, what: str, after_s: float, facts: Mapping[str, Any]) -> None:
        self.event("startup", {"what": what, "after_s": round(after_s, 1), **facts})

    def say_unless_json(self, text: str) -> None: ...

    def result(self, path: Path) -> None:
        self.event("result", json.loads(path.read_text()))

    def said(self, line: bytes) -> None: ...  # it is in the log, and what counts is in the rows

    def restart(self, code: int) -> None:
        self.event("restart", {"code": code})

    def stop(self, signal_name: str, text: str) -> None:
        self.event("stop", {"signal": signal_name, "text": text})

    def row(self, row: Mapping[str, Any]) -> None:
        kind = str(row["kind"])
        self.event(EVENTS.get(kind, kind), {k: v for k, v in row.items() if k != "kind"})

    def end(self, code: int, error: str | None, summary: Path) -> None:
        try:
            summed: Any = json.loads(summary.read_text())
        except (OSError, ValueError):  # there is none before a run is complete
            summed = None
        self.event("end", {"code": code, "error": error, "folder": str(summary.parent), "summary": summed})

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        self.say(json.dumps({"event": name, **facts}))


def make_console(out: TextIO, *, as_json: bool) -> Plain:
    """The kind that `out` can show."""
    if as_json:
        return JsonLines(sys.stdout)
    return Live(out) if out.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown") else Plain(out)


def is_noise(line: bytes) -> bool:
    return NOISE.match(line) is not None


def live_parts(
    now: Now, servers: tuple[int, int], steps: tuple[int, int], eta_s: float | None, age_s: float
) -> list[str]:
    """The pieces of the live line, the most important first. `servers`: ready, wanted; `steps`: done, wanted."""
    sampling, done = now.sampling, min(steps[0] + 1, steps[1])
    if not now.phase and not sampling:
        return ["starting", f"{age_s:.0f} s", f"servers {servers[0]}/{servers[1]}"]
    active = bool(sampling.get("active"))
    evaluating = active and sampling["what"] == "evaluation"
    parts = ["evaluation" if evaluating else f"step {done}/{steps[1]}"]
    if now.phase in ("train", "sync", "save"):
        parts.append(WORDS[now.phase])
    if active:
        total = max(1, sampling["total"])
        filled = BAR * sampling["done"] // total
        seconds = max(1e-3, time.time() - sampling["since"])
        parts += [f"{sampling['done']}/{sampling['total']} trajectories", f"{sampling['tokens'] / seconds:,.0f} tok/s"]
        parts.append(f"servers {sampling['servers']}/{sampling['of_servers']}")
        parts.append("━" * filled + "─" * (BAR - filled))
    elif now.phase == "sample":
        parts.append(WORDS["sample"])
    if eta_s is not None:
        parts.insert(1, f"ETA {as_clock(eta_s)}")
    return parts


def fit(parts: Sequence[str], width: int) -> str:
    """As many of the first parts as fit, at least one."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text += f"  {part}"
    return text


def as_clock(seconds: float) -> str:
    """E.g. 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Rows:
    """Follows a metrics.jsonl that a starting run cuts back: each row that was not there before, once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[int] = set()
        self._state: tuple[int, int] | None = None
        self._position = 0
        self.new()

    def new(self) -> list[dict[str, Any]]:
        try:
            stat = self._path.stat()
            if (stat.st_ino, stat.st_size) == self._state:
                return []
            if self._state is None or stat.st_ino != self._state[0]:
                self._position = 0
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except OSError:  # not there yet
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        self._state = (stat.st_ino, stat.st_size)
        fresh = []
        for line in whole.splitlines():
            if hash(line) not in self._seen:
                self._seen.add(hash(line))
                row = _row(line)
                if row is not None:
                    fresh.append(row)
        return fresh


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # cut off by a kill
        return None
    return row if isinstance(row, dict) and "kind" in row else None


@dataclass(slots=True)
class Pace:
    """How long the rest of a run takes: as long as its steps took in this process, evaluations and saves included."""

    num_steps: int
    done: int = 0
    _first: int = 0
    _since: float | None = None
    _last: float = 0.0

    def begins(self) -> None:
        """The loop has begun; counted once."""
        if self._since is None:
            self._since, self._first = time.monotonic(), self.done

    def step(self, number: int) -> None:
        self.done, self._last = number + 1, time.monotonic()

    def eta_s(self) -> float | None:
        if self._since is None or self.done <= self._first or self.done >= self.num_steps:
            return None
        each = (self._last - self._since) / (self.done - self._first)
        return max(0.0, each * (self.num_steps - self.done) - (time.monotonic() - self._last))


class Voice:
    """Hands what rank 0 writes into its log from now on to the console, errors to stderr."""

    def __init__(self, log: Path, console: Plain) -> None:
        log.touch()
        self.console = console
        self._file = log.open("rb")
        self._file.seek(0, os.SEEK_END)
        self._begun = b""  # of a line whose end is not written yet
        self._errors: list[str] = []

    @property
    def error(self) -> str | None:
        """Why the run ended, if anybody said so."""
        return self._errors[-1].removeprefix(ERROR_MARK) if self._errors else None

    def copy(self) -> None:
        *lines, self._begun = (self._begun + self._file.read()).split(b"\n")
        for line in lines:
            self._tell(line + b"\n")

    def close(self, last_words: list[str]) -> None:
        """Copies the rest, and says those of the run's last words that rank 0 has not said."""
        self.copy()
        if self._begun:
            self._tell(self._begun + b"\n")
        self._file.close()
        for line in last_words:
            if line not in self._errors:
                self._errors.append(line)
                self.console.warn(line)

    def _tell(self, line: bytes) -> None:
        if line.startswith(ERROR_MARK.encode()):
            self._errors.append(line.decode(errors="replace").rstrip("\n"))
            self.console.warn(self._errors[-1])
        else:
            self.console.said(line)


class Watched:
    """One attempt as the console shows it: its start-up, its rows, and how far it is. `notes`: where it notes its progress."""

    def __init__(
        self, metrics: Path, num_steps: int, voice: Voice, *, notes: Path = Path(os.devnull), trains: bool = True
    ) -> None:
        self.voice, self.notes, self.trains = voice, notes, trains
        self._rows, self._pace = Rows(metrics), Pace(num_steps)
        self._told: set[Path] = set()
        self._milestones = 0
        self._now = Now()
        self._started = time.monotonic()

    @property
    def has_begun(self) -> bool:
        """Whether this attempt has come to its first step; a replay samples nothing."""
        return bool(self._now.sampling) or self._now.phase not in ("", "sync")

    def look(self, status: Path, *, num_servers: int) -> None:
        """Shows what is new. `status`: the notes of the tasks."""
        console, ready = self.voice.console, set(status.glob("*.ready"))
        for note in sorted(ready - self._told):
            console.startup(note.stem, time.monotonic() - self._started, {})
        self._told |= ready
        self._now = read_progress(self.notes)
        for told in self._now.milestones[self._milestones :]:
            facts = {k: v for k, v in told.items() if k not in ("what", "after_s")}
            console.startup(told["what"], told["after_s"], facts)
            self._pace.done = facts.get("steps_done", self._pace.done)
        self._milestones = len(self._now.milestones)
        if self._now.sampling.get("what") == "step":
            self._pace.begins()
        self.voice.copy()
        for row in self._rows.new():
            if row["kind"] == "train":
                self._pace.step(int(row["step"]))
            console.row(row)
        up = sum(note.stem.startswith("server") for note in ready)
        console.tick(self._now, (up, num_servers), (self._pace.done, self._pace.num_steps), self._pace.eta_s())
