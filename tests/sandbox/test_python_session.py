# ruff: noqa: E501 - programs
"""`python_session`: a namespace that lives as long as its trajectory, in the real sandbox."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest
from pools import Pool, pool

from torl_mega.config import RolloutConfig, SandboxConfig
from torl_mega.config_file import load_config
from torl_mega.errors import SandboxFault
from torl_mega.rollout.chat import ChatTools
from torl_mega.rollout.fences import FencedTools
from torl_mega.rollout.python_session import PythonSession, PythonSessionTool
from torl_mega.rollout.python_tool import Limits
from torl_mega.rollout.tools import NoSandbox, make_tool
from torl_mega.sandbox.client import SandboxClient
from torl_mega.types import ExecutionStatus as S
from torl_mega.types import Problem, ToolCall

LIMITS = Limits(wall_s=5, cpu_s=5, memory_mb=512, output_bytes=65536)
PROBLEM = Problem("p", "", "", "")


@pytest.fixture(scope="module")
def served() -> Iterator[Pool]:
    with pool(data_libraries=False) as running:
        yield running


def run(served: Pool, *codes: str, wall_s: float = 60.0, limits: Limits = LIMITS) -> list[ToolCall]:
    async def work() -> list[ToolCall]:
        async with SandboxClient([served.address]) as client:
            session = PythonSessionTool(client, limits, wall_s).open(PROBLEM)
            return [await session.execute(code) for code in codes]

    return asyncio.run(work())


def said(calls: list[ToolCall]) -> list[str]:
    return [call.observation for call in calls]


def test_what_was_defined_is_there(served: Pool) -> None:
    calls = run(
        served,
        "x = 6\ndef f():\n    return x * 7\nclass A:\n    def __init__(self):\n        self.v = x\na = A()\nb = [a]",
        "print(f())",
        "x = 7\nprint(f(), a.v, type(a).__name__)",  # a function sees the variable as it is now
        "b[0].v = 9\nprint(a.v)",  # one object by two names stays one
        "import math as m, sympy as sp, numpy as np\ny = sp.Symbol('y')\nz = np.eye(2)\ng = lambda k: k + x",
        "print(sp.solve(y**2 - 2, y), m.floor(m.pi), z.sum(), g(1))",
        "print(sorted(name for name in globals() if not name.startswith('__')))",
        "def h(n):\n    return 1 if n < 2 else n * h(n - 1)\nA.w = property(lambda self: h(self.v))",
        "print(a.w, isinstance(a, A), __name__)",
    )
    assert said(calls) == [
        "(no output)", "42", "49 6 A", "9", "(no output)", "[-sqrt(2), sqrt(2)] 3 2.0 8",
        "['A', 'a', 'b', 'f', 'g', 'm', 'np', 'sp', 'x', 'y', 'z']", "(no output)", "362880 True __main__",
    ]  # fmt: skip
    assert {call.status for call in calls} == {S.OK}


def test_a_program_that_fails_keeps_what_it_did_until_then(served: Pool) -> None:
    calls = run(
        served, "x = 1", "x = 2\n1/0", "print(x)", "x = 3\nraise SystemExit(4)", "print(x)", "def (", "print(x)"
    )
    assert said(calls) == ["(no output)", "ZeroDivisionError: division by zero", "2", "the program exited with code 4", "3",
                           "SyntaxError: invalid syntax", "3"]  # fmt: skip
    assert [call.status for call in calls] == [S.OK, S.ERROR, S.OK, S.ERROR, S.OK, S.ERROR, S.OK]


def test_a_program_that_is_killed_leaves_the_session_as_it_was(served: Pool) -> None:
    short = dataclasses.replace(LIMITS, wall_s=0.5, cpu_s=0.5)
    calls = run(
        served,
        "x = 1",
        "x = 2\nwhile True: pass",
        "print(x)",
        "x = 3\nimport os\nos._exit(0)",
        "print(x)",
        limits=short,
    )
    assert calls[1].status in (S.TIMEOUT_CPU, S.TIMEOUT_WALL)
    assert (calls[2].observation, calls[4].observation) == ("1", "1")


PAIRS = {  # what one call does, what the next sees
    "generator": ("g = (i for i in range(3))\nnext(g)", "print(next(g))", "1"),
    "file": ("f = open('f', 'w')\nf.write('a')\nf.flush()", "f.write('b')\nf.close()\nprint(open('f').read())", "ab"),
    "enum": ("from enum import Enum\nclass C(Enum):\n    R = 1", "print(C.R, C(1) is C.R)", "C.R True"),
    "typing": (
        "from typing import TypeVar, Generic\nT = TypeVar('T')\nclass B(Generic[T]):\n    pass",
        "print(B[int]().__class__.__name__)",
        "B",
    ),
    "registry": (
        "class A:\n    reg = []\n    def __init_subclass__(cls):\n        A.reg.append(cls)\nclass D(A): pass",
        "class E(A): pass\nprint([c.__name__ for c in A.reg])",
        "['D', 'E']",
    ),
    "delegation": (
        "class P:\n    def __init__(self, o):\n        self.o = o\n    def __getattr__(self, n):\n        return getattr(self.o, n)\np = P([3])",
        "print(p.index(3))",
        "0",
    ),
    "exception": (
        "class E2(Exception):\n    def __init__(self, a, b):\n        super().__init__(a + b)\ntry:\n    raise E2('x', 'y')\nexcept E2 as e:\n    last = e",
        "print(last)",
        "xy",
    ),
    "shadowed": (
        "len = 5\nopen = None\ndef exec(x):\n    return x\ncompile = set = 7",
        "print(len, exec(2), compile)",
        "5 2 7",
    ),
    "star": ("from os import *\nfrom gzip import *\nx = 1", "print(x)", "1"),
    "large": ("s = list(range(2_000_000))\nprint('ANS', sum(s))", "print(len(s))", "2000000"),
    "random": (
        "import random\nrandom.seed(3)\na = random.random()",
        "random.seed(3)\nprint(random.random() == a)",
        "True",
    ),
    "unseeded": ("import random\nr = random.random()\nprint(r)", "print(0 <= r < 1)", "True"),
    "modules": (
        "import decimal, sys\nfrom mpmath import mp, sqrt\nmp.dps = 30\ndecimal.getcontext().prec = 50\nsys.setrecursionlimit(5000)",
        "print(mp.dps, decimal.getcontext().prec, sys.getrecursionlimit())",
        "30 50 5000",
    ),
    "chdir": ("import os\nos.makedirs('d')\nos.chdir('d')\nx = 5", "print(x, os.path.basename(os.getcwd()))", "5 d"),
    "linked": ("n = None\nfor i in range(3000):\n    n = (i, n)", "print(n[0])", "2999"),
    "lambdify": ("import sympy as sp\nx = sp.Symbol('x')\nf = sp.lambdify(x, x**2)", "print(f(3))", "9"),
    "traceback": (
        "def f():\n    return 1 / 0",
        "import traceback\ntry:\n    f()\nexcept ZeroDivisionError:\n    print(traceback.format_exc().splitlines()[-2].strip(' ^~') or traceback.format_exc().splitlines()[-3].strip())",
        "return 1 / 0",
    ),
    "output": ("print('heard once')", "print('new')", "new"),
}


@pytest.mark.parametrize("what", sorted(PAIRS))
def test_the_next_call_sees_what_a_living_interpreter_would(served: Pool, what: str) -> None:
    first, second, seen = PAIRS[what]
    calls = run(served, first, second)
    assert calls[0].status is S.OK, calls[0]
    assert (calls[1].observation, calls[1].status) == (seen, S.OK)


def test_a_session_has_a_limit_of_its_own(served: Pool) -> None:
    calls = run(served, "x = 1", "import time; time.sleep(9)", "print(x)", wall_s=0.7)
    assert calls[1].status in (S.TIMEOUT_WALL, S.TIMEOUT_CPU)
    assert calls[2].observation == "TimeoutError: this session has used its 0.7 seconds"
    assert (calls[2].status, calls[2].wall_s) == (S.TIMEOUT_WALL, 0.0)


def test_what_is_run_again_does_not_count_against_a_call(served: Pool) -> None:
    limits = dataclasses.replace(LIMITS, wall_s=1.0, cpu_s=1.0)
    calls = run(served, *["import time; time.sleep(0.4)"] * 4, "print(7)", limits=limits)
    assert calls[-1].observation == "7"
    assert all(call.wall_s < 0.9 for call in calls)


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_sessions_are_kept_apart(served: Pool, count: int) -> None:
    async def one(tool: PythonSessionTool, n: int, places: asyncio.Semaphore) -> tuple[int, str]:
        session = tool.open(PROBLEM)
        async with places:
            first = await session.execute(f"values = [{n}]\ndef add(k):\n    values.append(k + {n})\n    return values")
        assert first.status is S.OK, first
        async with places:
            second = await session.execute("add(1)")
        assert second.status is S.OK, second
        async with places:
            third = await session.execute("print(add(2))")
        await session.close()
        return n, third.observation

    async def work() -> list[tuple[int, str]]:
        async with SandboxClient([served.address]) as client:
            tool = PythonSessionTool(client, LIMITS, 60.0)
            places = asyncio.Semaphore(count)
            return await asyncio.gather(*(one(tool, n, places) for n in range(count)))

    for n, observation in asyncio.run(work()):
        assert observation == f"[{n}, {n + 1}, {n + 2}]"


def test_a_sandbox_that_fails_is_a_fault() -> None:
    with pytest.raises(SandboxFault, match="nothing runs here"):
        asyncio.run(PythonSession(PythonSessionTool(NoSandbox(), LIMITS, 9.0)).execute("1"))


def test_the_config_makes_it() -> None:
    rollout = load_config("conf/base.yaml", ["data.train=arithmetic:1", "rollout.tools=[python_session]"]).rollout
    tool = make_tool(rollout, SandboxConfig(), NoSandbox())
    assert isinstance(tool, FencedTools)
    assert isinstance(tool.python, PythonSessionTool)
    assert tool.names == ("python",)
    assert not isinstance(tool, ChatTools)
    with pytest.raises(ValueError, match="both are called python"):
        RolloutConfig.model_validate({**rollout.model_dump(), "tools": ["python", "python_session"]})
