"""The pool: limits, head and tail, admission, retries, fairness, recycling, determinism."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pools import descendants, wait_gone

from torl_mega.config import SandboxConfig
from torl_mega.sandbox.pool import SandboxPool
from torl_mega.types import ExecutionRequest as R
from torl_mega.types import ExecutionStatus as S

SYMPY = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6, x))"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as r:
        yield r


@pytest.fixture(scope="module")
def pool(runner: asyncio.Runner) -> Iterator[SandboxPool]:
    made = SandboxPool(SandboxConfig(max_running=4))
    runner.run(made.start())
    yield made
    runner.run(made.close())


def test_cpu_limit_counts_cpu(runner: asyncio.Runner, pool: SandboxPool) -> None:
    slept = runner.run(pool.run(R("import time; time.sleep(1); print(1)", wall_s=20, cpu_s=0.5)))
    assert slept.status is S.OK
    burnt = runner.run(pool.run(R("while True: pass", wall_s=60, cpu_s=0.5)))
    assert (burnt.status, burnt.return_code) == (S.TIMEOUT_CPU, None)
    assert 0.45 <= burnt.cpu_s < 1.5


def test_head_and_tail(runner: asyncio.Runner, pool: SandboxPool) -> None:
    r = runner.run(
        pool.run(
            R("for i in range(100000): print(i)\nimport sys\nsys.stderr.write('y' * 100000)\n1/0", output_bytes=1000)
        )
    )
    assert r.stdout.startswith("0\n1\n")
    assert r.stdout.endswith("99999\n")
    assert "bytes left out" in r.stdout
    assert len(r.stdout) < 1100
    assert r.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_flood_is_stopped(runner: asyncio.Runner, pool: SandboxPool) -> None:
    r = runner.run(pool.run(R("while True: print('x' * 1000)", wall_s=60, cpu_s=60)))
    assert (r.status, r.return_code) == (S.OUTPUT_LIMIT, None)
    assert r.wall_s < 30


def test_queue_time_counts_against_no_limit(runner: asyncio.Runner) -> None:
    """Four slots, nobody set aside: the last of 24 sleepers begins long after its own limit would have passed."""

    async def burst() -> tuple[list[S], float]:
        async with SandboxPool(SandboxConfig(max_running=4, max_aside=0)) as small:
            start = time.monotonic()
            sleepers = [small.run(R("import time; time.sleep(0.4)", wall_s=1.5)) for _ in range(24)]
            return [r.status for r in await asyncio.gather(*sleepers)], time.monotonic() - start

    statuses, whole_s = runner.run(burst())
    assert set(statuses) == {S.OK}
    assert whole_s > 24 / 4 * 0.4


def test_ordinary_answers_survive_hostile_neighbours(runner: asyncio.Runner, pool: SandboxPool) -> None:
    from hostile import cases

    hostile = [c for c in cases() if "@" not in c.code][::4][:60]
    assert len(hostile) == 60

    async def mixed() -> int:
        ordinary = [
            pool.run(R(f"import sympy, numpy as np\nprint(sympy.factorint({n}), np.arange({n % 7}).sum())"))
            for n in range(2, 302)
        ]
        others = [pool.run(R(c.code, wall_s=1.0, cpu_s=1.0)) for c in hostile]
        merged = [x for pair in zip(ordinary[:60], others, strict=True) for x in pair] + ordinary[60:]
        results = await asyncio.gather(*merged)
        answers = [r.stdout for i, r in enumerate(results) if i >= 120 or i % 2 == 0]
        import sympy

        return sum(
            a != f"{sympy.factorint(n)} {sum(range(n % 7))}\n" for n, a in zip(range(2, 302), answers, strict=True)
        )

    assert runner.run(mixed()) == 0


@pytest.mark.parametrize("tier", ["A", "B"])
def test_killed_zygotes_lose_no_answer(tier: str) -> None:
    async def main() -> Counter[S]:
        async with SandboxPool(SandboxConfig(tier=tier, max_running=4, zygotes=2, data_libraries=False)) as pool:  # type: ignore[arg-type]
            burst = [asyncio.create_task(pool.run(R(SYMPY, wall_s=20, cpu_s=20))) for _ in range(120)]
            for _ in range(2):
                await asyncio.wait(burst[:20], return_when=asyncio.FIRST_COMPLETED)
                for zygote in list(pool._kinds["math"].zygotes):
                    assert zygote.process is not None
                    os.kill(zygote.process.pid, signal.SIGKILL)
                await asyncio.sleep(0.5)
            results = await asyncio.gather(*burst)
            assert all(r.stdout == "[2, 3]\n" for r in results if r.status is S.OK)
            again = await pool.run(R("print(1)"))
            assert again.status is S.OK
            return Counter(r.status for r in results)

    before = descendants(os.getpid())
    counts = asyncio.run(main())
    assert set(counts) <= {S.OK, S.INFRA}
    assert counts[S.OK] >= 100
    assert wait_gone(descendants(os.getpid()) - before, 5.0) == set()


@pytest.mark.parametrize("victim", ["init", "maker"])
def test_a_slot_without_its_init_costs_no_answer(victim: str) -> None:
    """Killed while the pool is idle: fork into a pid namespace whose init is gone gives ENOMEM, for good."""

    async def main() -> list[S]:
        async with SandboxPool(SandboxConfig(tier="A", max_running=2, zygotes=1, data_libraries=False)) as pool:
            statuses = [(await pool.run(R("print(1)"))).status]
            zygote = pool._kinds["math"].zygotes[0]
            assert zygote.process is not None
            root = zygote.process.pid  # this pool's: other tests' pools are descendants of this process too
            init = next(iter(descendants(root) - descendants(root, slot_inits=False)))
            maker = int(Path(f"/proc/{init}/stat").read_text().rsplit(")", 1)[1].split()[1])
            os.kill(init if victim == "init" else maker, signal.SIGKILL)
            while not zygote.dead:
                await asyncio.sleep(0.01)
            return [*statuses, *[(await pool.run(R("print(1)"))).status for _ in range(3)]]

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [S.OK] * 4


def test_zygotes_are_recycled() -> None:
    async def main() -> tuple[set[int], set[S]]:
        seen: set[int] = set()
        async with SandboxPool(SandboxConfig(max_running=2, zygotes=1, data_libraries=False, recycle_after=10)) as pool:
            statuses = set()
            for _ in range(120):
                statuses.add((await pool.run(R("print(1)"))).status)
                seen |= {z.process.pid for z in pool._kinds["math"].zygotes if z.process}
                if len(seen) >= 3:
                    break
                await asyncio.sleep(0.05)
        return seen, statuses

    seen, statuses = asyncio.run(main())
    assert len(seen) >= 2
    assert statuses == {S.OK}


def test_cancelling_a_call_stops_its_snippet(runner: asyncio.Runner, pool: SandboxPool) -> None:
    async def main() -> float:
        call = asyncio.create_task(pool.run(R("import time; time.sleep(100)", wall_s=100)))
        while not pool.num_running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        start = time.monotonic()
        while pool.num_running:
            await asyncio.sleep(0.01)
        return time.monotonic() - start

    assert runner.run(main()) < 2.0


def test_data_libraries_have_a_zygote_of_their_own(runner: asyncio.Runner, pool: SandboxPool) -> None:
    code = "import pandas as pd\n"
    code += "import scipy.optimize as o\nroot = o.brentq(lambda x: x*x-2, 0, 2)\nprint(pd.Series([1, 2]).sum(), round(root, 3))"
    assert runner.run(pool.run(R(code))).stdout == "3 1.414\n"
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.savefig('p.png')"
    assert runner.run(pool.run(R(plot, fetch_files=("p.png",)))).files["p.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "code", ["import" + " " * 200_000 + "os", "import " + "a," * 200_000 + "os", " " * 400_000 + "1"]
)
def test_no_program_is_slow_to_look_at(runner: asyncio.Runner, pool: SandboxPool, code: str) -> None:
    """Choosing its zygote happens in the pool's own loop, where time is everybody's."""
    start = time.monotonic()
    assert runner.run(pool.run(R(code))).status in (S.OK, S.ERROR)
    assert time.monotonic() - start < 3.0


def test_deterministic_random_repeats() -> None:
    async def main() -> tuple[str, str]:
        async with SandboxPool(SandboxConfig(max_running=1, data_libraries=False, deterministic_random=True)) as pool:
            code = "import random, numpy\nprint(random.random(), numpy.random.rand(), list({'a', 'b', 'c'}))"
            return (await pool.run(R(code))).stdout, (await pool.run(R(code))).stdout

    first, second = asyncio.run(main())
    assert first == second != ""


def test_files_are_read_back_before_the_folder_goes() -> None:
    """Tier B removes large folders in a helper, which must not be quicker than the pool."""
    code = "import os\nfor i in range(20):\n    os.mkdir(f'd{i}')\n    open(f'd{i}/x', 'w').write(str(i))"
    names = tuple(f"d{i}/x" for i in range(20))

    async def main() -> list[int]:
        async with SandboxPool(SandboxConfig(tier="B", max_running=4, data_libraries=False)) as pool:
            calls = (pool.run(R(code, fetch_files=names, wall_s=20, cpu_s=20)) for _ in range(24))
            found = [len(r.files) for r in await asyncio.gather(*calls)]
            late = await pool.run(R(code + "\nwhile True: pass", fetch_files=names, wall_s=0.5))
            assert pool.setup is not None
            assert pool.setup.scratch is not None
            while list(Path(pool.setup.scratch).glob("zygote-*/*")):  # nothing is kept for ever
                await asyncio.sleep(0.02)
        return [*found, len(late.files)]

    assert asyncio.run(main()) == [20] * 25
