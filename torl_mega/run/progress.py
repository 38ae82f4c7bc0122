"""What a run is doing at this moment, for the console of the launcher that started it.

    rank 0 ─────────────────────► phase.json        whose turn it is: sample, train, sync or save
    whoever runs the episodes ──► sampling.json     trajectories done and wanted, tokens, servers in use
    rank 0 ─────────────────────► milestones.jsonl  the start-up, one line a step

TORL_PROGRESS names the folder. Only the launcher of one machine sets it; without it, as on a cluster, nothing is written.
Nobody but a console reads these files: a run never depends on them, so what the disk refuses is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torl_mega.interfaces import Turns

VARIABLE = "TORL_PROGRESS"
EVERY_S = 0.2  # sampling.json is written at most so often


@dataclass(slots=True)
class Progress:
    """Writes into `folder`, or nothing where it is None."""

    folder: Path | None = None
    what: str = "step"  # or "evaluation"
    step: int = 0
    servers: Callable[[], tuple[int, int]] = lambda: (0, 0)  # in use, known
    _due: float = 0.0

    @classmethod
    def from_environment(cls) -> Progress:
        named = os.environ.get(VARIABLE)
        return cls(Path(named) if named else None)

    def begins(self, what: str, step: int) -> None:
        """What the trajectories from now on are for."""
        self.what, self.step = what, step

    def phase(self, name: str) -> None:
        self._write("phase.json", {"phase": name, "since": time.time()})

    def milestone(self, what: str, after_s: float, **facts: Any) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError), (self.folder / "milestones.jsonl").open("a") as out:
                out.write(json.dumps({"what": what, "after_s": round(after_s, 1), **facts}) + "\n")

    @contextlib.contextmanager
    def sampling(self, total: int) -> Iterator[Callable[[int], None]]:
        """For a collection of `total` trajectories; call what is yielded with the tokens of each one that is done."""
        done = tokens = 0
        since = time.time()

        def write(*, active: bool) -> None:
            up, known = self.servers()
            now = {"what": self.what, "step": self.step, "done": done, "total": total, "tokens": tokens, "since": since}
            self._write("sampling.json", {**now, "servers": up, "of_servers": known, "active": active})

        def add(more_tokens: int) -> None:
            nonlocal done, tokens
            done, tokens = done + 1, tokens + more_tokens
            if time.monotonic() >= self._due:
                self._due = time.monotonic() + EVERY_S
                write(active=True)

        write(active=True)
        try:
            yield add
        finally:
            write(active=False)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f".{name}.{os.getpid()}"
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(value))
            temporary.replace(self.folder / name)


@dataclass(frozen=True, slots=True)
class ToldTurns:
    """`Turns` that notes whose turn it is."""

    turns: Turns
    progress: Progress

    def train(self) -> None:
        self.progress.phase("train")
        self.turns.train()

    def sync(self) -> None:
        self.progress.phase("sync")
        self.turns.sync()

    def sample(self) -> None:
        self.progress.phase("sample")
        self.turns.sample()

    def save(self) -> None:
        self.progress.phase("save")
        self.turns.save()


@dataclass(frozen=True, slots=True)
class Now:
    """What the files say."""

    phase: str = ""  # "" before the loop
    sampling: Mapping[str, Any] = field(default_factory=dict)  # empty before the first collection
    milestones: tuple[Mapping[str, Any], ...] = ()


def read_progress(folder: Path) -> Now:
    """What is there; a line that is just being written is left for the next time."""
    phase, sampling = _read(folder / "phase.json"), _read(folder / "sampling.json")
    told = []
    with contextlib.suppress(OSError):
        for line in (folder / "milestones.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                told.append(json.loads(line))
    return Now(str(phase.get("phase", "")), sampling, tuple(told))


def _read(path: Path) -> Mapping[str, Any]:
    with contextlib.suppress(OSError):
        return json.loads(path.read_text())
    return {}
