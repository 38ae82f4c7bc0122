"""The grader process: same verdicts as in the main process, hangs and bombs cost their own limit, nothing survives anybody."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from torl_mega.reward.answers import grade
from torl_mega.reward.grader import Grader, Verdict

ROOT = Path(__file__).resolve().parents[2]
HARD = "\\int e^{x^2}\\sin(x)\\cos(x^2)\\sqrt{x+1} dx"
HANG = (HARD, "1+" + HARD)  # math-verify tries to integrate
BOMB = ("\\int 10^{10^{9}} dx", "1+\\int 10^{10^{9}} dx")  # math-verify computes the power


def rows() -> list[tuple[str, str]]:
    found = []
    for name in ("grader_corpus.jsonl", "grader_corpus_hostile.jsonl"):
        for line in (ROOT / "tests/data" / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            before, unit, times, after = row.get("repeat", [row.get("answer"), "", 0, ""])
            found.append((before + unit * times + after, row["gold"]))
    return [pair for pair in found if "\\sum" not in pair[1]][::3]


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


async def until(condition, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "did not come true"
        await asyncio.sleep(0.02)


async def with_grader(work, **settings):
    grader = Grader(**{"workers": 2, "timeout_s": 30.0, **settings})
    await grader.start()
    assert grader._process is not None
    pid = grader._process.pid
    try:
        return await work(grader, pid)
    finally:
        await grader.close()
        assert not Path(f"/proc/{pid}").exists()


def test_workers_give_the_verdicts_of_the_main_process() -> None:
    pairs = rows()

    async def work(grader: Grader, pid: int) -> list[Verdict]:
        return list(await asyncio.gather(*(grader.check(a, g) for a, g in pairs)))

    verdicts = asyncio.run(with_grader(work))
    assert {v.value for v in verdicts} == {"right", "wrong"}
    assert [v is Verdict.RIGHT for v in verdicts] == [grade(a, g) for a, g in pairs]


def test_a_hang_costs_its_own_limit_and_others_do_not_wait() -> None:
    async def work(grader: Grader, pid: int) -> None:
        hard = [HARD.replace("x+1", f"x+{i}") for i in range(1, 7)]
        hangs = [asyncio.create_task(grader.check(h, "1+" + h)) for h in hard]
        ordinary = await asyncio.gather(*(grader.check(str(i), str(i + i % 2)) for i in range(300)))
        assert ordinary.count(Verdict.RIGHT) == ordinary.count(Verdict.WRONG) == 150
        await until(lambda: len(children(pid)) > 3)  # more than its two workers: the hanging ones were set aside
        assert set(await asyncio.gather(*hangs)) == {Verdict.TIMEOUT}
        assert await grader.check("1", "1") is Verdict.RIGHT

    asyncio.run(with_grader(work, timeout_s=6.0))


def test_a_memory_bomb_is_stopped_by_its_limit() -> None:
    async def work(grader: Grader, pid: int) -> None:
        assert await grader.check(*BOMB) in (Verdict.TIMEOUT, Verdict.WRONG)  # math-verify may swallow the MemoryError
        assert await grader.check("2", "2") is Verdict.RIGHT
        limit = re.search(r"Max address space +(\d+)", Path(f"/proc/{children(pid)[0]}/limits").read_text())
        assert limit is not None
        assert int(limit[1]) < 2 << 30

    asyncio.run(with_grader(work, memory_mb=256))


def test_a_worker_killed_from_outside_is_replaced_and_its_answer_tried_again() -> None:
    async def work(grader: Grader, pid: int) -> None:
        task = asyncio.create_task(grader.check(*HANG))
        await until(lambda: children(pid))
        first = children(pid)
        os.kill(first[0], signal.SIGKILL)
        await until(lambda: set(children(pid)) - set(first))
        assert not task.done()  # it runs again
        assert await grader.check("3", "3") is Verdict.RIGHT
        assert await task is Verdict.TIMEOUT

    asyncio.run(with_grader(work, timeout_s=4.0))


def test_the_grader_process_comes_back_when_it_was_killed() -> None:
    async def work(grader: Grader, pid: int) -> None:
        task = asyncio.create_task(grader.check(*HANG))
        await until(lambda: children(pid))
        os.kill(pid, signal.SIGKILL)
        assert await grader.check("3", "3") is Verdict.RIGHT
        assert await task is Verdict.TIMEOUT
        assert grader.num_restarts == 1
        assert grader._process is not None
        assert grader._process.pid != pid

    asyncio.run(with_grader(work, timeout_s=4.0))


def test_repeated_pairs_are_answered_from_memory() -> None:
    async def work(grader: Grader, pid: int) -> None:
        assert await grader.check("\\frac12", "0.5") is Verdict.RIGHT
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await asyncio.wait_for(grader.check("\\frac12", "0.5"), 1.0) is Verdict.RIGHT
        finally:
            os.kill(pid, signal.SIGCONT)

    asyncio.run(with_grader(work))


def test_nothing_survives_a_parent_that_is_killed() -> None:
    program = f"""
import asyncio, sys
from torl_mega.reward.grader import Grader
async def main():
    grader = Grader(2, 600.0)
    await grader.start()
    task = asyncio.create_task(grader.check({HANG[0]!r}, {HANG[1]!r}))
    await grader.check("1", "1")
    print(grader._process.pid, flush=True)
    await task
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    pool = int(parent.stdout.readline())
    family = [pool, *children(pool)]
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while any(_alive(pid) for pid in family):
        assert time.monotonic() < end, "a grader process outlived its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
