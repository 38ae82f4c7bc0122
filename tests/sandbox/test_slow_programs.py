"""Slow programs keep nobody waiting: a slot is for the first moments of a program, and what it waits for is not its time."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from torl_mega.config import SandboxConfig
from torl_mega.sandbox.aside import Aside
from torl_mega.sandbox.host import ZygoteHandle
from torl_mega.sandbox.jail.clock import MUCH_S, PATIENCE
from torl_mega.sandbox.pool import SandboxPool
from torl_mega.types import ExecutionRequest as R
from torl_mega.types import ExecutionResult
from torl_mega.types import ExecutionStatus as S

SLEEP = R("import time; time.sleep(3); print('slept')", wall_s=5, cpu_s=5)
LOOP = R("while True: pass", wall_s=1, cpu_s=1)
HUNGRY = R("x = bytearray(200 << 20)\nimport time; time.sleep(1); print(len(x))", wall_s=20, cpu_s=20)
SYMPY = R("from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))", wall_s=2, cpu_s=2)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as r:
        yield r


@pytest.fixture(scope="module", params=["A", "B"])
def pool(runner: asyncio.Runner, request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    made = SandboxPool(SandboxConfig(tier=request.param))
    runner.run(made.start())
    yield made
    runner.run(made.close())


def behind(runner: asyncio.Runner, pool: SandboxPool, slow: list[R]) -> tuple[float, float, list[ExecutionResult]]:
    """Seconds in which eight prints behind `slow` answer and in which all of them end; how they end."""

    async def run() -> tuple[float, list[ExecutionResult]]:
        slower = [asyncio.create_task(pool.run(request)) for request in slow]
        while not len(pool._aside):  # the first have run for a while
            await asyncio.sleep(0.01)
        asked = time.monotonic()
        quick = await asyncio.gather(*(pool.run(R("print(6*7)")) for _ in range(8)))
        answered = time.monotonic()
        assert [r.stdout for r in quick] == ["42\n"] * 8
        return answered - asked, await asyncio.gather(*slower)

    began = time.monotonic()
    waited, ended = runner.run(run())
    return waited, time.monotonic() - began, ended


def test_sleepers_take_no_slot(runner: asyncio.Runner, pool: SandboxPool) -> None:
    waited, whole, ended = behind(runner, pool, [SLEEP] * 48)
    assert Counter(r.stdout for r in ended) == {"slept\n": 48}
    assert waited < 0.5
    assert whole < 6


def test_loops_take_no_slot_and_end_by_their_limits(runner: asyncio.Runner, pool: SandboxPool) -> None:
    waited, whole, ended = behind(runner, pool, [LOOP] * 24)
    assert waited < 0.5
    assert {r.status for r in ended} <= {S.TIMEOUT_WALL, S.TIMEOUT_CPU}
    cores = len(os.sched_getaffinity(0))
    assert whole < 24 * MUCH_S / cores + PATIENCE * LOOP.wall_s + 3


def test_memory_hungry_programs_are_held_and_all_end_well(runner: asyncio.Runner, pool: SandboxPool) -> None:
    waited, _, ended = behind(runner, pool, [HUNGRY] * 40)
    assert waited < 0.5
    assert Counter(r.stdout for r in ended) == {f"{200 << 20}\n": 40}


def test_no_ordinary_program_times_out_because_others_hang(runner: asyncio.Runner, pool: SandboxPool) -> None:
    async def run() -> list[ExecutionResult]:
        hanging = [asyncio.create_task(pool.run(LOOP)) for _ in range(20)]
        ordinary = await asyncio.gather(*(pool.run(SYMPY) for _ in range(60)))
        await asyncio.gather(*hanging)
        return ordinary

    assert Counter((r.status, r.stdout) for r in runner.run(run())) == {(S.OK, "[2, 3]\n"): 60}


def test_time_without_a_core_is_not_the_programs(runner: asyncio.Runner, pool: SandboxPool) -> None:
    """It gets its half second of a core, beside programs that take all, though a second goes by meanwhile."""
    work = "import time\nwhile time.process_time() < {:.1f}: pass\nprint('done')"

    async def run() -> list[ExecutionResult]:
        return await asyncio.gather(*(pool.run(R(work.format(0.6), wall_s=1.0, cpu_s=5)) for _ in range(6)))

    ended = runner.run(run())
    assert {r.stdout for r in ended} == {"done\n"}
    if len(os.sched_getaffinity(0)) <= 2:
        assert max(r.wall_s for r in ended) > 1.0


def test_a_sleeper_ends_at_its_limit_to_the_tenth(runner: asyncio.Runner, pool: SandboxPool) -> None:
    async def run() -> list[ExecutionResult]:
        asleep = R("import time; time.sleep(9)", wall_s=1.0, cpu_s=5)
        return await asyncio.gather(*(pool.run(asleep) for _ in range(8)))

    ended = runner.run(run())
    assert {r.status for r in ended} == {S.TIMEOUT_WALL}
    assert all(0.95 <= r.wall_s <= 1.4 for r in ended), [r.wall_s for r in ended]


def test_few_calls_behind_many_are_not_the_last(runner: asyncio.Runner, pool: SandboxPool) -> None:
    order: list[str] = []

    async def call(name: str) -> None:
        await pool.run(R("print(1)"))
        order.append(name)

    async def run() -> None:
        many = [asyncio.create_task(call("many")) for _ in range(60)]
        await asyncio.sleep(0)
        await asyncio.gather(*(call("few") for _ in range(4)))
        await asyncio.gather(*many)

    runner.run(run())
    assert max(i for i, name in enumerate(order) if name == "few") < 30


class Orders(ZygoteHandle):
    def __init__(self) -> None:
        self.given: list[tuple[int, str]] = []

    def order(self, request_id: int, what: str) -> None:
        self.given.append((request_id, what))


def test_the_newest_are_held_while_memory_shrinks_and_go_on_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torl_mega.sandbox.aside.available_mb", lambda: 1000.0)
    book, zygote = Aside(limit=4, keep=1), Orders()
    for snippet in range(5):
        book.note_long(snippet, zygote)
    assert book.take() == 4  # the fifth stays in its slot
    assert book.balance(900, 4) == 4
    zygote.given.clear()
    assert book.balance(340, 4) == 4
    assert zygote.given == [(2, "hold"), (3, "hold")]
    assert book.balance(340, 4) == 4  # it does not shrink any more: the oldest goes on
    assert zygote.given[2:] == [(2, "go")]
    assert book.balance(150, 4) == 1  # one begins at a time
    assert zygote.given[3:] == [(1, "hold"), (2, "hold")]
    assert book.balance(50, 4) == 0
    assert book.leave(0)
    assert zygote.given[5:] == [(1, "go")]  # one always runs, or no memory would ever be given back
    assert book.take() == 1
    assert zygote.given[6:] == [(4, "aside"), (4, "hold")]
    book.balance(900, 4)
    assert zygote.given[8:] == [(2, "go")]


def test_nothing_stays_of_slow_programs_that_are_cancelled(runner: asyncio.Runner, pool: SandboxPool) -> None:
    async def run() -> tuple[int, int]:
        tasks = [asyncio.create_task(pool.run(SLEEP)) for _ in range(12)]
        while len(pool._aside) < 12:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(pool._aside), pool.num_running

    assert runner.run(run()) == (0, 0)
