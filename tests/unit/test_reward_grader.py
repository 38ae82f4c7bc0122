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

from torl_mega.reward.answers.check import grade
from torl_mega.reward.grader import Grader, Verdict

ROOT = Path(__file__).resolve().parents[2]
BOMB = ("\\int 9^{10^{10}} dx", "\\int 10^{10^{9}} dx")  # math-verify computes the powers


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


async def hang(grader: Grader, pid: int, pair: tuple[str, str]) -> tuple[int, asyncio.Task[Verdict]]:
    """(pid of the worker, verdict to come) of a check whose worker is stopped under it: it hangs for good."""
    assert await grader.check("0", "0") is Verdict.RIGHT  # a worker is up and free
    [worker] = children(pid)
    os.kill(worker, signal.SIGSTOP)
    task = asyncio.create_task(grader.check(*pair))
    await asyncio.sleep(0)
    return worker, task


def test_a_hang_costs_its_own_limit_and_others_do_not_wait() -> None:
    async def work(grader: Grader, pid: int) -> None:
        pair = ("1000007", "1000007")  # the longest: it is taken up first when all arrive together
        worker, hanging = await hang(grader, pid, pair)
        ordinary = await asyncio.gather(*(grader.check(str(i), str(i + i % 2)) for i in range(100, 160)))
        assert ordinary.count(Verdict.RIGHT) == ordinary.count(Verdict.WRONG) == 30
        assert not hanging.done()  # it was set aside: the only worker's place is free
        assert await hanging is Verdict.TIMEOUT
        await until(lambda: worker not in children(pid))
        assert await grader.check(*pair) is Verdict.RIGHT  # a timeout is not remembered

    asyncio.run(with_grader(work, workers=1, timeout_s=4.0))


def test_a_memory_bomb_is_stopped_by_its_limit() -> None:
    async def work(grader: Grader, pid: int) -> None:
        assert await grader.check(*BOMB) in (Verdict.TIMEOUT, Verdict.WRONG)  # math-verify may swallow the MemoryError
        assert await grader.check("2", "2") is Verdict.RIGHT
        await until(lambda: children(pid) != [])  # the worker after the bomb may still be starting
        limit = re.search(r"Max address space +(\d+)", Path(f"/proc/{children(pid)[0]}/limits").read_text())
        assert limit is not None
        assert int(limit[1]) < 2 << 30

    asyncio.run(with_grader(work, memory_mb=256, timeout_s=4.0))


def test_a_worker_killed_from_outside_is_replaced_and_its_answer_tried_again() -> None:
    async def work(grader: Grader, pid: int) -> None:
        worker, task = await hang(grader, pid, ("7", "7"))
        await grader.check("8", "8")  # answered by another worker: the first one has its job
        os.kill(worker, signal.SIGKILL)
        assert await task is Verdict.RIGHT

    asyncio.run(with_grader(work, workers=1, timeout_s=60.0))


def test_the_grader_process_comes_back_when_it_was_killed() -> None:
    async def work(grader: Grader, pid: int) -> None:
        worker, task = await hang(grader, pid, ("7", "7"))
        os.kill(pid, signal.SIGKILL)
        assert await task is Verdict.RIGHT
        assert grader.counters["grader_restarted"] == 1
        assert grader._process is not None
        assert grader._process.pid != pid
        await until(lambda: not _alive(worker))  # its worker went with it

    asyncio.run(with_grader(work, workers=1, timeout_s=60.0))


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
    program = """
import asyncio, sys
from torl_mega.reward.grader import Grader
async def main():
    grader = Grader(2, 600.0)
    await grader.start()
    await grader.check("1", "1")
    print(grader._process.pid, flush=True)
    await asyncio.Event().wait()
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
