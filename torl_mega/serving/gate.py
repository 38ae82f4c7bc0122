"""When may a server start on GPUs that it shares with the trainer in turns? Notes of rank 0 and the side-cars, as files.

A server takes all its memory while it starts, so it starts only while the servers have the GPUs, and the trainer's turn waits
for one that is starting. In TORL_STATUS, the folder of all tasks of one attempt:

    turn                    rank 0's: `servers` or `trainer`; before the first, servers start and ranks wait for them
    gpus_of_<host>_<port>   a side-car's: `starting`, `waiting` or `up`

Contract: each side writes its own note before it reads the other's, so two that write at once cannot both go ahead: the
side-car steps back. Without TORL_STATUS, of a server that was started by hand, the gate is open.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from torl_mega.errors import ServerError
from torl_mega.run.files import write_text

POLL_S = 0.2


def notes_folder() -> Path | None:
    """TORL_STATUS, if there is one."""
    return Path(os.environ["TORL_STATUS"]) if os.environ.get("TORL_STATUS") else None


class ServerGate:
    """A side-car's side of the gate."""

    def __init__(self, folder: Path | None, host: str, port: int) -> None:
        self._folder = folder
        self._name = f"gpus_of_{host}_{port}"

    async def enter(self) -> bool:
        """Waits until the server may start, and says that it does. Returns whether it had to wait."""
        waited = False
        while self._folder is not None:
            self._say("starting")
            if not self._trainer_has_them():
                break
            self._say("waiting")
            waited = True
            while self._trainer_has_them():
                await asyncio.sleep(POLL_S)
        return waited

    def passed(self) -> None:
        """The server is up: it can be told to let go."""
        self._say("up")

    def _say(self, word: str) -> None:
        if self._folder is not None:
            write_text(self._folder / self._name, word)

    def _trainer_has_them(self) -> bool:
        turn = self._folder / "turn" if self._folder else None
        return turn is not None and turn.exists() and turn.read_text() == "trainer"


class TrainerGate:
    """Rank 0's side of the gate. `limit_s`: how long a server may take to start."""

    def __init__(self, folder: Path | None, limit_s: float) -> None:
        self._folder, self._limit_s = folder, limit_s

    def open(self) -> None:
        """Servers may start."""
        if self._folder is not None:
            write_text(self._folder / "turn", "servers")

    def close(self) -> None:
        """No server starts from now on; returns once none is starting. Raises ServerError after the limit."""
        if self._folder is None:
            return
        write_text(self._folder / "turn", "trainer")
        deadline = time.monotonic() + self._limit_s
        while starting := [note.name for note in self._folder.glob("gpus_of_*") if note.read_text() == "starting"]:
            if time.monotonic() > deadline:
                servers = ", ".join(name.removeprefix("gpus_of_").replace("_", ":") for name in sorted(starting))
                raise ServerError(
                    f"{servers} did not start within serving.startup_timeout_s = {self._limit_s:g} s and holds the trainer's "
                    "GPUs; see its log"
                )
            time.sleep(POLL_S)
