"""How families of chat models write calls of tools in their turns. Pure text: what a turn says, nothing is run.

    hermes   <tool_call>{"name": "calc", "arguments": {"x": 1}}</tool_call>      Qwen 2.5 and 3, Hermes
    llama3   {"name": "calc", "parameters": {"x": 1}}; {…}                       Llama 3.1 to 3.3, the whole turn
    fenced   ```calc                                                            any model that is told so
             {"x": 1}
             ```

A tagged call that was begun and cannot be read is a call too: its `error` is what the policy is answered. What stands in the
thought that a turn begins with (`<think>`) is none. Sources: the chat templates of these models; sglang/srt/function_call/
{hermes,llama32}_detector.py, which read the same forms but cannot be imported here: a rank's environment has no SGLang.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PYTHON_TAG = "<|python_tag|>"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Written:
    """One call as it was written."""

    name: str  # empty where it could not be read
    arguments: dict[str, Any] | str  # text where the family writes text
    error: str = ""  # why it could not be read


Reader = Callable[[str], list[Written]]
"""The calls of one turn, in order. The turn's closing token is not in its text."""


def hermes(turn: str) -> list[Written]:
    """Every `<tool_call>` of the turn; a closing tag inside of its JSON's strings closes nothing."""
    text = without_thoughts(turn)
    calls: list[Written] = []
    at = text.find("<tool_call>")
    while at >= 0:
        start = at + len("<tool_call>")
        value, end = _json(text, start)
        rest = text[end:].lstrip()
        if value is not None and (not rest or rest.startswith("</tool_call>")):
            calls += [_named(one) for one in (value if isinstance(value, list) and value else [value])]
        else:
            end = start
            calls.append(Written("", "", "the call is no JSON object between <tool_call> and </tool_call>"))
        closed = text.find("</tool_call>", end)
        at = text.find("<tool_call>", closed if closed >= 0 else len(text))
    return calls


def llama3(turn: str) -> list[Written]:
    """A turn that begins with a JSON object with a name, or what follows `<|python_tag|>`, is calls, separated by `;`, commas or
    white space; any other is an answer, and so is what follows the calls."""
    text = without_thoughts(turn)
    tagged = PYTHON_TAG in text
    text = text.partition(PYTHON_TAG)[2] if tagged else text
    text = text.replace(PYTHON_TAG, ";").strip()
    calls: list[Written] = []
    at = 0
    while text[at : at + 1] == "{":
        value, end = _json(text, at)
        if value is None:
            meant = (
                tagged or calls or re.match(r"""\{\s*["'](name|type|function|parameters|arguments)["']""", text[at:])
            )
            return [*calls, Written("", "", "the call is no JSON object")] if meant else []
        if not tagged and not calls and not {"name", "function"} & value.keys():
            return []
        calls.append(_named(value))
        at = end + len(text[end:]) - len(text[end:].lstrip(";, \n\r\t"))
    return calls


def fenced(names: Sequence[str]) -> Reader:
    """Every closed block whose language is one of `names`."""
    opening = re.compile("|".join(rf"```{re.escape(name)}[ \t]*" for name in names))

    def read(turn: str) -> list[Written]:
        calls: list[Written] = []
        name, lines = "", []
        for line in without_thoughts(turn).split("\n"):
            line = line.removesuffix("\r")
            if not name and opening.fullmatch(line):
                name, lines = line.strip("` \t"), []
            elif name and line.rstrip() == "```":
                calls.append(Written(name, "\n".join(lines) + "\n"))
                name = ""
            elif name:
                lines.append(line)
        return calls

    return read


def without_thoughts(turn: str) -> str:
    """The turn without the thought that it begins with; nothing while it still thinks. Later tags are text."""
    if not turn.lstrip().startswith("<think>"):
        return turn
    return turn.partition("</think>")[2]


def _json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, after white space, and where it ends; None where there is none."""
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        value, end = _DECODER.raw_decode(text, at)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError, of lone surrogates, is a ValueError
        return None, at
    return value, end


def _named(value: Any) -> Written:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]  # {"type": "function", "function": {…}}
    name = value.get("name", value.get("function")) if isinstance(value, dict) else None
    if not isinstance(name, str):
        return Written("", "", "the call has no name")
    keys = [key for key in ("arguments", "parameters") if key in value]
    if not keys and value.keys() - {"name", "function", "type", "id"}:
        return Written(name, "", f"the call of {name[:64]} has no arguments")
    arguments = value[keys[0]] if keys else {}
    if isinstance(arguments, dict):
        return Written(name, arguments)
    return Written(name, "", f"the arguments of {name[:64]} are no JSON object")
