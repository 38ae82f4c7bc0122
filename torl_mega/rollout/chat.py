"""Tools of a chat model: calls stand in whole turns of the assistant, results come back as the template's own messages.

    … assistant: I compute. <tool_call>…</tool_call> <tool_call>…</tool_call> <|im_end|>         sampled
      <tool_response>42</tool_response> <tool_response>7</tool_response> … assistant:            inserted: ChatTemplate.results

A turn without a call is the answer. Calls of one turn are made one after the other, each is answered. C counts calls: those that
are left are made, further ones of the same turn are answered with a refusal, and a turn that begins without any left is the answer
whatever it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torl_mega.data.chat_template import ChatTemplate
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, DataError, ToolFault
from torl_mega.interfaces import ChatSession
from torl_mega.rollout.call_formats import Reader, Written, fenced, hermes, llama3
from torl_mega.rollout.fences import PYTHON, FencedTools, OpenTools
from torl_mega.rollout.own_tool import tool_of_class
from torl_mega.rollout.python_tool import NO_OUTPUT, cut
from torl_mega.types import ExecutionStatus, Problem, ToolCall

MOST_CALLS = 32
"""Calls of one turn that are answered; a turn that repeats itself may hold thousands."""
FAMILIES: Mapping[str, Reader] = {"hermes": hermes, "llama3": llama3}
SAMPLE = ("calc", {"text": 'a "b"\n</tool_call>', "n": [1, {"x": None}]})


class Python:
    """Runs a Python program and returns what it prints."""

    name = PYTHON

    async def __call__(self, code: str) -> str:
        raise NotImplementedError("the sandbox runs it")


@dataclass(frozen=True, slots=True)
class ChatTools:
    """Implements `ChatTool`."""

    box: FencedTools
    template: ChatTemplate
    family: str  # hermes | llama3 | fenced
    read: Reader

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.template.end_ids

    def open(self, problem: Problem) -> ChatSession:
        return _Session(self, OpenTools(self.box, problem))

    def calls_of(self, turn: str) -> list[Written]:
        """The first MOST_CALLS calls in the text of a turn, with or without its closing token."""
        closing = next((mark for mark in self.template.closings if turn.endswith(mark)), "")
        return self.read(self.template.begun + turn.removesuffix(closing))[:MOST_CALLS]

    def follow(self, calls: Sequence[ToolCall]) -> tuple[int, ...]:
        """Ids of the messages that hold the results, up to the assistant's next turn. Raises ToolFault."""
        try:
            if self.family != "fenced":
                return self.template.results([(call.tool or "unknown", call.observation) for call in calls])
            return self.template.results([("", "\n".join(f"```output\n{call.observation}\n```" for call in calls))])
        except DataError as exc:
            raise ToolFault(str(exc)) from exc


@dataclass(slots=True)
class _Session:
    chat: ChatTools
    tools: OpenTools

    async def calls(self, turn: str, *, most: int) -> tuple[ToolCall, ...]:
        """Every call of the turn with its answer; `most` are made. Raises ToolFault."""
        written = self.chat.calls_of(turn)
        return tuple([await self._call(call, refused=n >= most) for n, call in enumerate(written)])

    async def _call(self, call: Written, *, refused: bool) -> ToolCall:
        box = self.chat.box
        if call.error or call.name not in box.names:
            known = f"the tools are {', '.join(box.names)}"
            return _answer(call.error or f"there is no tool {call.name[:64]!r}; {known}")
        if refused:
            return _answer("no more calls can be made; answer now", tool=call.name)
        if call.name == PYTHON and box.python is not None:
            code, wrong = _code(call.arguments)
            return _answer(wrong, tool=PYTHON) if code is None else await self.tools.python.execute(code)
        tool = box.tools[call.name]
        answer = await self.tools.own(call.name).call(call.arguments)
        code = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
        shown = cut(answer.text, most=tool.max_chars) or NO_OUTPUT  # some templates leave an empty message out
        return ToolCall(code, answer.status, None, shown, answer.wall_s, tool=tool.name)

    async def close(self) -> None:
        await self.tools.close()


def _answer(text: str, *, tool: str = "") -> ToolCall:
    """What is said to a call of which nothing was run."""
    return ToolCall("", ExecutionStatus.ERROR, None, text, 0.0, tool=tool)


def _code(arguments: Mapping[str, Any] | str) -> tuple[str | None, str]:
    """The program of a call of Python, or what is wrong with it."""
    if isinstance(arguments, str):
        return arguments, ""
    code = arguments.get("code")
    if isinstance(code, str) and set(arguments) == {"code"}:
        return code, ""
    return None, "python: one argument is needed, code, a text"


def make_chat(
    box: FencedTools, tokenizer: Tokenizer, *, system: str | None, arguments: Mapping[str, Any], family: str
) -> ChatTools:
    """The family is `auto`, the one whose calls are read from what the template writes for a call, or its name. Raises DataError
    for a template that cannot be used, ConfigError for one that writes other calls than the family's."""
    schemas = [tool.schema for tool in box.tools.values()]
    if box.python is not None:
        schemas.insert(0, tool_of_class(Python, PYTHON).schema)
    tokenizer.check_plain(json.dumps(schemas, ensure_ascii=False), "rollout.tools: a description")
    tokenizer.check_plain(system or "", "data.system")
    if family == "auto" and "tools" not in tokenizer.chat_template(for_tools=True):
        family = "fenced"
    if family == "fenced":
        template = ChatTemplate(tokenizer, system=system, result_role="user", arguments=arguments)
        return ChatTools(box, template, family, fenced(box.names))
    template = ChatTemplate(tokenizer, system=system, tools=schemas, arguments=arguments)
    found, shown = _family_of(template)
    if found is None or family not in ("auto", found):
        raise ConfigError(
            f"rollout.call_format = {family}, but the chat template of {tokenizer.path} writes a call as {shown[:120]!r}, "
            f"which is {found or 'no form that is read here'}; set rollout.call_format={found or 'fenced'}"
        )
    return ChatTools(box, template, found, FAMILIES[found])


def _family_of(template: ChatTemplate) -> tuple[str | None, str]:
    """The family that reads a call from what the template writes for it, and that text; empty where it writes none."""
    text = (template.written_calls([SAMPLE]) or "").rpartition(template.closing)[0]
    return next((name for name, read in FAMILIES.items() if read(text) == [Written(*SAMPLE)]), None), text
