"""Python as a tool, by the text protocol of the paper (arXiv 2503.23383 §2.2).

The policy writes a ```python block and then opens an ```output block; generation stops there, the last python block
runs in the sandbox, and `\\n{observation}\\n```\\n` is inserted. `PythonTool` implements `Tool`; all else here is pure text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from torl_mega.errors import SandboxFault
from torl_mega.interfaces import Sandbox
from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus, Problem, ToolCall

STOP = "```output"
MAX_OBSERVATION_CHARS = 256
NO_CODE = "(no python code block found)"
NO_OUTPUT = "(no output)"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use, as in `SandboxConfig`."""

    wall_s: float
    cpu_s: float
    memory_mb: int
    output_bytes: int  # per stream


@dataclass(frozen=True, slots=True)
class PythonTool:
    """Runs the last ```python block that the policy wrote, whichever turn it stands in."""

    sandbox: Sandbox
    limits: Limits
    stop: tuple[str, ...] = (STOP,)

    def open(self, problem: Problem) -> PythonTool:
        """Programs keep nothing between calls, so one serves all."""
        return self

    async def close(self) -> None:
        pass

    async def call(self, written: str) -> ToolCall:
        """Raises SandboxFault when the sandbox could not say how the program ended."""
        return await call_last_block(written, self.execute)

    async def execute(self, code: str) -> ToolCall:
        """Runs a program; the observation is what it says, without a fence. Raises SandboxFault."""
        box = self.limits
        result = await self.sandbox.run(
            ExecutionRequest(
                code, wall_s=box.wall_s, cpu_s=box.cpu_s, memory_mb=box.memory_mb, output_bytes=box.output_bytes
            )
        )
        if result.status is ExecutionStatus.INFRA:
            raise SandboxFault(f"sandbox: {result.message}")
        body = cut(render_body(result, wall_s=box.wall_s, memory_mb=box.memory_mb))
        return ToolCall(code, result.status, result.return_code, body, result.wall_s)


async def call_last_block(written: str, execute: Callable[[str], Awaitable[ToolCall]]) -> ToolCall:
    """What `execute` says to the last block of what the policy wrote, in the fence that is inserted."""
    code = last_code_block(written)
    if code is None:
        return ToolCall("", ExecutionStatus.ERROR, None, frame(NO_CODE), 0.0)
    ran = await execute(code)
    return dataclasses.replace(ran, observation=frame(ran.observation))


def last_code_block(text: str) -> str | None:
    """The last complete ```python block of what the policy wrote, or None.

    Line by line as the released code's `extract_program`: a line that starts or ends with ```python opens a block, any
    other line that starts with ``` closes it; a block that is still open is not a program.
    """
    spans, is_open = _fences(text)
    return (text[slice(*spans[-1])] or "\n") if spans and not is_open else None  # an empty block is a program too


def code_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of every complete ```python block's program in `text`, in order."""
    return _fences(text)[0]


def _fences(text: str) -> tuple[list[tuple[int, int]], bool]:
    """The programs of closed blocks, and whether the text ends inside a block."""
    spans: list[tuple[int, int]] = []
    start: int | None = None
    at = 0
    for line in text.split("\n"):
        if line.startswith("```python") or line.endswith("```python"):
            start = at + len(line) + 1
        elif line.startswith("```"):
            if start is not None:
                spans.append((start, at))
            start = None
        at += len(line) + 1
    return spans, start is not None


def frame(body: str, *, most: int = MAX_OBSERVATION_CHARS) -> str:
    """The text that is inserted for `body`, which is cut to `most` characters, the paper's 128 + ... + 128."""
    return f"\n{cut(body, most=most)}\n```\n"


def cut(body: str, *, most: int = MAX_OBSERVATION_CHARS) -> str:
    """`body` without white space around it, and without its middle where it has more than `most` characters."""
    body = body.strip()
    return body if len(body) <= most else body[: most - most // 2] + "..." + body[len(body) - most // 2 :]


def render_body(result: ExecutionResult, *, wall_s: float, memory_mb: int) -> str:
    """stdout where there is some, else the last line of the error, else what happened in words.

    The released code tells a program that printed nothing that it timed out; here it is told that it printed nothing. INFRA
    never gets here: the policy is never shown an infrastructure fault.
    """
    assert result.status is not ExecutionStatus.INFRA
    status = result.status
    if status is ExecutionStatus.TIMEOUT_WALL or status is ExecutionStatus.TIMEOUT_CPU:
        return f"TimeoutError: the program ran longer than {wall_s:g} seconds"
    if status is ExecutionStatus.MEMORY:
        return f"MemoryError: the program used more than {memory_mb} MB"
    if result.stdout.strip():
        return result.stdout
    if status is ExecutionStatus.OK:
        return NO_OUTPUT
    error = result.stderr.strip().split("\n")[-1].strip()
    if error:
        return error
    if status is ExecutionStatus.SIGNAL:
        return f"the program was killed by signal {-(result.return_code or 0)}"
    return f"the program exited with code {result.return_code}"
