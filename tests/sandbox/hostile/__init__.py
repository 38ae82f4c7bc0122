"""A corpus of hostile programs: what each one tries, and what must hold whatever it does.

A program prints ESCAPED when it got what it must not get; a line that starts with it fails the test. `allowed` are the
statuses it may end with. Placeholders: @FILE@ a file of the pool's user, @DIR@ a folder it may write to, @PID@ a process
of that user, @POOL@ the pool's process, @PORT@ a TCP port that listens on 127.0.0.1, @SOCK@ the pool's own unix socket,
@ABSTRACT@ an abstract unix socket that listens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torl_mega.types import ExecutionStatus as S

ANY = frozenset(s for s in S if s is not S.INFRA)
REFUSED = frozenset({S.OK, S.ERROR})  # it noticed, and printed so or died of the exception
TIMEOUT = frozenset({S.TIMEOUT_WALL, S.TIMEOUT_CPU})


@dataclass(frozen=True)
class Hostile:
    name: str
    tries: str
    code: str
    allowed: frozenset[S] = REFUSED
    stdout: str | None = None  # exact, where the answer is known
    wall_s: float = 1.0
    stdin: str = ""

    @property
    def limit_s(self) -> float:
        """Wall and CPU limit: short where nothing else ends the program, or where any end is right."""
        if self.allowed <= TIMEOUT:
            return 0.2
        return min(self.wall_s, 0.4) if self.allowed == ANY and self.wall_s == 1.0 else self.wall_s


def cases() -> list[Hostile]:
    from hostile import (
        endings,
        files,
        interpreter,
        kernel,
        libraries,
        limits,
        native,
        network,
        output,
        processes,
        secrets,
    )

    modules = (
        endings, files, interpreter, kernel, libraries, limits, native, network, output, processes, secrets,
    )  # fmt: skip
    return [case for module in modules for case in module.CASES]
