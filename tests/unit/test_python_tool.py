"""Python as a tool: which program runs under which limits, and what the policy is told."""

import asyncio

import pytest

from torl_mega.errors import SandboxFault, ToolFault
from torl_mega.interfaces import Tool
from torl_mega.rollout.python_tool import Limits, PythonTool, frame, last_code_block, render_body
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus, ToolCall

S = ExecutionStatus


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("no code at all", None),
        ("```python\nprint(1)\n```\n```output", "print(1)\n"),
        ("```python\nprint(1)\n```output", "print(1)\n"),  # the closing fence forgotten
        ("```python\na=1\n```\nthen\n```python\nb=2\n```\n```output", "b=2\n"),
        ("So ```python\nprint(1)\n```\n", "print(1)\n"),  # opened at the end of a line, as the released code allows
        ("```python\nprint(1)", None),  # never closed
        ("```python\na=1\n```\n```python\nb=2", None),  # the last block is still open
        ("```\nprint(1)\n```\n", None),  # not python
        ("```python\n```\n", "\n"),
        ("```python\nif x:\n    print('```')\n```\n", "if x:\n    print('```')\n"),
    ],
)
def test_last_code_block(text, program):
    assert last_code_block(text) == program


def result(status=S.OK, rc=0, out="", err=""):
    return ExecutionResult(status, rc, out, err, 0.1, 0.1, 10.0)


@pytest.mark.parametrize(
    ("executed", "body"),
    [
        (result(out="42\n"), "42"),
        (result(out=""), "(no output)"),
        (
            result(S.ERROR, 1, "", "Traceback …\n  File …\nNameError: name 'x' is not defined\n"),
            "NameError: name 'x' is not defined",
        ),
        (result(S.ERROR, 1, "partial\n", "ValueError: no"), "partial"),
        (result(S.ERROR, 3), "the program exited with code 3"),
        (result(S.TIMEOUT_WALL, None, "partial"), "TimeoutError: the program ran longer than 5 seconds"),
        (result(S.MEMORY, None), "MemoryError: the program used more than 512 MB"),
        (result(S.SIGNAL, -11), "the program was killed by signal 11"),
    ],
)
def test_observations(executed, body):
    assert frame(render_body(executed, wall_s=5.0, memory_mb=512)) == f"\n{body}\n```\n"


def test_long_observations_keep_128_characters_of_each_end():
    text = frame("a" * 200 + "b" * 200)
    assert text == "\n" + "a" * 128 + "..." + "b" * 128 + "\n```\n"
    assert frame("c" * 256) == "\n" + "c" * 256 + "\n```\n"


def test_the_policy_is_never_shown_an_infrastructure_fault():
    with pytest.raises(AssertionError):
        render_body(result(S.INFRA, None), wall_s=5.0, memory_mb=512)


class Box:
    """A Sandbox with one answer, which remembers what it was asked."""

    def __init__(self, answer: ExecutionResult) -> None:
        self.answer, self.requests = answer, []

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        self.requests.append(request)
        return self.answer


LIMITS = Limits(wall_s=1.5, cpu_s=2.5, memory_mb=64, output_bytes=999)


def call(box: Box, written: str) -> ToolCall:
    tool: Tool = PythonTool(box, LIMITS)
    assert written.endswith(tool.stop)
    return asyncio.run(tool.call(written))


def test_a_call_runs_the_last_program_of_all_turns_under_the_limits():
    box = Box(result(out="42\n"))
    made = call(
        box, "```python\nprint(42)\n```\n```output" + " then ```output"
    )  # the second call wrote no program of its own
    assert box.requests == [ExecutionRequest("print(42)\n", wall_s=1.5, cpu_s=2.5, memory_mb=64, output_bytes=999)]
    assert made == ToolCall("print(42)\n", S.OK, 0, "\n42\n```\n", 0.1)


def test_what_the_program_did_is_an_observation_and_what_the_sandbox_did_an_error():
    written = "```python\n1/0\n```\n```output"
    failed = call(Box(result(S.ERROR, 1, "", "ZeroDivisionError: division by zero")), written)
    assert (failed.status, failed.observation) == (S.ERROR, "\nZeroDivisionError: division by zero\n```\n")
    slow = call(Box(result(S.TIMEOUT_WALL, None)), written)
    assert slow.observation == "\nTimeoutError: the program ran longer than 1.5 seconds\n```\n"
    down = ExecutionResult(S.INFRA, None, "", "", 0.0, 0.0, 0.0, message="no slot")
    with pytest.raises(SandboxFault, match="sandbox: no slot") as fault:
        call(Box(down), written)
    assert isinstance(fault.value, ToolFault)


def test_a_call_without_a_program_is_told_so_and_runs_nothing():
    box = Box(result())
    made = call(box, "no code ```output")
    assert (made.code, made.status, made.observation) == ("", S.ERROR, "\n(no python code block found)\n```\n")
    assert box.requests == []
