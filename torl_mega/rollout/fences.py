"""The paper's text protocol with any tools: a block whose language is a tool's name is a call of it.

    ```search                        ```python                       (examples/own_tool.py)
    {"query": "…", "num": 3}         print(6*7)
    ```                              ```
    ```output                        ```output
    … answer …                       42
    ```                              ```

Generation stops where the policy opens an output block; the last closed block of a known language that was written since the call
before is the call. With Python alone the paper's tool is used as it is, which looks for its block in all turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torl_mega.interfaces import ToolSession
from torl_mega.rollout.own_tool import OwnTool, OwnToolSession
from torl_mega.rollout.python_session import PythonSession, PythonSessionTool
from torl_mega.rollout.python_tool import STOP, PythonTool, frame
from torl_mega.types import ExecutionStatus, Problem, ToolCall

PYTHON = "python"


@dataclass(frozen=True, slots=True)
class FencedTools:
    """Implements `Tool`. `python`: the tool behind ```python, if there is one."""

    tools: Mapping[str, OwnTool]  # by name
    python: PythonTool | PythonSessionTool | None
    stop: tuple[str, ...] = (STOP,)

    def open(self, problem: Problem) -> ToolSession:
        return _Session(OpenTools(self, problem))

    @property
    def names(self) -> tuple[str, ...]:
        return (*((PYTHON,) if self.python is not None else ()), *self.tools)


@dataclass(slots=True)
class OpenTools:
    """Those that one trajectory has called, each opened at its first call."""

    box: FencedTools
    problem: Problem
    _own: dict[str, OwnToolSession] = field(default_factory=dict)
    _python: PythonTool | PythonSession | None = None

    def own(self, name: str) -> OwnToolSession:
        return self._own.setdefault(name, OwnToolSession(self.box.tools[name], self.problem))

    @property
    def python(self) -> PythonTool | PythonSession:
        assert self.box.python is not None
        self._python = self._python or self.box.python.open(self.problem)
        return self._python

    async def close(self) -> None:
        async with contextlib.AsyncExitStack() as stack:  # each is closed, also when another's close fails
            for session in (*self._own.values(), *([self._python] if self._python else [])):
                stack.push_async_callback(session.close)


@dataclass(slots=True)
class _Session:
    tools: OpenTools
    seen: int = 0  # characters that were written up to the last call

    async def call(self, written: str) -> ToolCall:
        new, self.seen = written[self.seen :], len(written)
        box = self.tools.box
        name, text = last_block(new, box.names) or (None, "")
        if name is None:
            shown = frame(f"(no call found; the tools are {', '.join(box.names)})")
            return ToolCall("", ExecutionStatus.ERROR, None, shown, 0.0, tool="")
        if name == PYTHON and box.python is not None:
            return await self.tools.python.call(new)
        answer = await self.tools.own(name).call(text)
        shown = frame(answer.text, most=box.tools[name].max_chars)
        return ToolCall(text, answer.status, None, shown, answer.wall_s, tool=name)

    async def close(self) -> None:
        await self.tools.close()


def last_block(text: str, names: Sequence[str]) -> tuple[str, str] | None:
    """(language, content) of the last closed block whose language is one of `names`; None when it is still open, or there is none.

    Lines as python_tool.py reads them: one that is or ends with ```NAME opens (```python also at its start), another that starts
    with ``` closes.
    """
    last: tuple[str, str] | None = None
    name, start, at = "", 0, 0
    for line in text.split("\n"):
        opened = next((n for n in names if line.rstrip() == f"```{n}" or line.endswith(f"```{n}")), None)
        if opened is None and line.startswith("```python") and PYTHON in names:
            opened = PYTHON
        if opened is not None:
            name, start = opened, at + len(line) + 1
        elif line.startswith("```"):
            if name:
                last = (name, text[start:at] or "\n")
            name = ""
        at += len(line) + 1
    return None if name else last


def describe(box: FencedTools) -> str:
    """What stands for `{tools}` in a template: each tool, what it does, and how it is called."""
    lines = ["- python: runs a program and shows what it prints"] if box.python is not None else []
    for tool in box.tools.values():
        properties = tool.schema["function"]["parameters"].get("properties", {})
        arguments = ", ".join(f"{name}: {what.get('type', 'any')}" for name, what in properties.items())
        lines.append(f"- {tool.name}({arguments}): {' '.join(tool.description.split())}")
    return "\n".join(lines)
