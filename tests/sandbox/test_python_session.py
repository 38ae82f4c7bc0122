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


def run(served: Pool, *codes: str, wall_s: float = 60.0, state_mb: int = 4, limits: Limits = LIMITS) -> list[ToolCall]:
    async def work() -> list[ToolCall]:
        async with SandboxClient([served.address]) as client:
            session = PythonSessionTool(client, limits, wall_s, state_mb).open(PROBLEM)
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


def test_what_has_no_bytes_is_gone_alone(served: Pool) -> None:
    calls = run(
        served,
        "import threading\nx = 1\ng = (i for i in range(3))\nopen('f', 'w').write('a')\nlock = threading.Lock()",
        "print(x)", "print(g)", "import os; print(os.path.exists('f'))",
    )  # fmt: skip
    assert said(calls)[1:] == ["1", "NameError: name 'g' is not defined", "False"]


def test_a_session_has_limits_of_its_own(served: Pool) -> None:
    calls = run(served, "x = 1", "x = bytearray(3 << 20)", "print(x)", state_mb=1)
    assert calls[1].status is S.MEMORY
    assert "need more than 1 MB; those of this call are not kept" in calls[1].observation
    assert calls[2].observation == "1"
    calls = run(served, "x = 1", "import time; time.sleep(9)", "print(x)", wall_s=0.7)
    assert calls[1].observation.startswith("TimeoutError: the program ran longer than 0.")
    assert calls[2].observation == "TimeoutError: this session has used its 0.7 seconds"
    assert (calls[2].status, calls[2].wall_s) == (S.TIMEOUT_WALL, 0.0)


def test_a_forged_state_hurts_its_own_trajectory_alone(served: Pool) -> None:
    """The bytes are read in the jail; what they do there, a program could do anyway."""
    calls = run(
        served,
        "x = 1",
        "import atexit\natexit.register(lambda: open('.session', 'wb').write(b'cos\\nsystem\\n'))",
        "print(x)",
        "print(1)",
    )
    assert calls[2].status is S.ERROR
    assert "UnpicklingError" in calls[2].observation or "Error" in calls[2].observation
    link = run(
        served,
        "x = 1",
        "import os\nos.unlink('.session') if os.path.exists('.session') else None\nos.symlink('/etc/passwd', '.session')",
        "print(x)",
    )
    assert "root" not in link[2].observation


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
            tool = PythonSessionTool(client, LIMITS, 60.0, 4)
            places = asyncio.Semaphore(count)
            return await asyncio.gather(*(one(tool, n, places) for n in range(count)))

    for n, observation in asyncio.run(work()):
        assert observation == f"[{n}, {n + 1}, {n + 2}]"


def test_a_sandbox_that_fails_is_a_fault() -> None:
    with pytest.raises(SandboxFault, match="nothing runs here"):
        asyncio.run(PythonSession(PythonSessionTool(NoSandbox(), LIMITS, 9.0, 1)).execute("1"))


def test_the_config_makes_it() -> None:
    rollout = load_config("conf/base.yaml", ["data.train=arithmetic:1", "rollout.tools=[python_session]"]).rollout
    tool = make_tool(rollout, SandboxConfig(), NoSandbox())
    assert isinstance(tool, FencedTools)
    assert isinstance(tool.python, PythonSessionTool)
    assert tool.names == ("python",)
    assert not isinstance(tool, ChatTools)
    with pytest.raises(ValueError, match="both are called python"):
        RolloutConfig.model_validate({**rollout.model_dump(), "tools": ["python", "python_session"]})
