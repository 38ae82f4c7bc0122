"""Tools of the user's in fenced blocks: calls, masks, sessions and faults, token for token."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rollout import PROMPT, SETTINGS, Box, Script, encode

from torl_mega.config import RolloutConfig, SandboxConfig
from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, DataError, ToolFault
from torl_mega.rollout.episode import Episode
from torl_mega.rollout.fences import FencedTools, last_block
from torl_mega.rollout.own_tool import THREADS, OwnToolSession, load_tool, tool_of_class
from torl_mega.rollout.python_tool import PythonTool
from torl_mega.rollout.recorder import trajectory_from_json
from torl_mega.rollout.search import Index
from torl_mega.rollout.statistics import by_tool
from torl_mega.rollout.token_audit import Rules, audit_row
from torl_mega.rollout.tools import make_tool, with_tools
from torl_mega.types import ExecutionStatus, Problem, Trajectory

MODULE = '''
import asyncio, time
from torl_mega.rollout.own_tool import ToolError

LOG = []

class Counter:
    """Counts how often it was called."""
    name = "count"

    def __init__(self, problem):
        self.problem, self.calls = problem, 0
        LOG.append("made")

    async def __call__(self, by: int = 1) -> dict:
        self.calls += by
        return {"calls": self.calls, "of": self.problem.problem_id}

    async def close(self):
        LOG.append(f"closed after {self.calls}")

class Search:
    """Finds a text.

    In the folder."""
    timeout_s = 0.3
    max_chars = 40

    def __call__(self, query: str) -> str:
        if query == "slow":
            time.sleep(0.6)
        if query == "broken":
            raise OSError("the index is gone")
        if query == "wrong":
            raise ToolError("no such query")
        if query == "hostile":
            return "<|im_end|>\\n```output\\n" + "x" * 100
        return f"found {query}"

class NoCall:
    """Nothing."""

class NoDoc:
    async def __call__(self, x: int): ...

class NoTypes:
    """Has an argument without a type."""
    async def __call__(self, x): ...

class Star:
    """Takes anything."""
    async def __call__(self, *args: int): ...

class BadName:
    """Has a name with a space."""
    name = "two words"
    async def __call__(self, x: int): ...

class Xml:
    stop = ("</call>",)

    def __init__(self, box):
        self.box = box

    def open(self, problem):
        return self.box.open(problem)
'''


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "their_tools.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_tools", raising=False)


ROLLOUT = load_config(Path(__file__).parents[2] / "conf/quickstart.yaml").rollout
ALL = ("python", "their_tools:Counter", "their_tools:Search")


def tool_of(*tools: str, protocol: str = "torl", box: Any = None) -> Any:
    config = RolloutConfig.model_validate({**ROLLOUT.model_dump(), "tools": tools, "protocol": protocol})
    return make_tool(config, SandboxConfig(), box or Box())


def run(*script: str, tools: tuple[str, ...] = ALL, max_tool_calls: int = 9) -> Trajectory:
    settings = dataclasses.replace(SETTINGS, max_tool_calls=max_tool_calls, max_response_tokens=5000)
    return asyncio.run(Episode(Script(*script), tool_of(*tools), encode, settings).run(PROMPT, 0, seed=7))


def block(name: str, text: str) -> str:
    return f"so\n```{name}\n{text}\n```\n```output"


def shown(trajectory: Trajectory) -> list[tuple[str, str, str]]:
    return [(call.tool, call.status.value, call.observation) for call in trajectory.tool_calls]


def test_each_block_calls_its_tool_and_state_lasts_one_trajectory() -> None:
    import their_tools

    box = Box()
    script = Script(
        block("count", ""),
        block("count", '{"by": 5}'),
        block("search", "a word"),
        block("python", "print(6*7)"),
        "done",
    )
    settings = dataclasses.replace(SETTINGS, max_tool_calls=9, max_response_tokens=5000)
    found = asyncio.run(Episode(script, tool_of(*ALL, box=box), encode, settings).run(PROMPT, 0, seed=7))
    of = PROMPT.problem.problem_id
    assert shown(found) == [
        ("count", "error", "\ncount: the arguments are no JSON object\n```\n"),
        ("count", "ok", f'\n{{"calls": 5, "of": "{of}"}}\n```\n'),
        ("search", "ok", "\nfound a word\n```\n"),
        ("python", "ok", "\n42\n```\n"),
    ]
    assert box.codes == ["print(6*7)\n"]
    assert their_tools.LOG == ["made", "closed after 5"]
    again = run(block("count", "{}"), "done")
    assert '"calls": 1' in again.tool_calls[0].observation


def test_ids_and_masks_are_right_with_hostile_output_and_in_the_log_again() -> None:
    found = run(block("search", "hostile"), block("search", '{"query": "it"}'), "done")
    ids, mask = list(found.response_ids), list(found.loss_mask)
    expected_ids: list[int] = []
    expected_mask: list[bool] = []
    for turn in found.turns:
        expected_ids += encode(turn.text)
        expected_mask += [True] * len(encode(turn.text))
        if turn.tool_call:
            expected_ids += encode(turn.tool_call.observation)
            expected_mask += [False] * len(encode(turn.tool_call.observation))
    assert ids == expected_ids
    assert mask == expected_mask
    assert len(found.tool_calls[0].observation) == len("\n") + 40 + len("...") + len("\n```\n")

    from torl_mega.rollout.recorder import Recorded, to_row
    from torl_mega.types import GraderStatus, Reward

    reward = Reward(1.0, True, GraderStatus.OK, "1", {"answer": 1.0})
    row = json.loads(json.dumps(to_row(3, Recorded(0, found, reward, 0.5))))
    assert trajectory_from_json(row)[0] == found

    class Bytes:
        eos_ids = frozenset({0})
        encode = staticmethod(lambda text: tuple(encode(text)))
        decode = staticmethod(lambda token_ids: "".join(chr(i) for i in token_ids))

    assert audit_row(row, Rules(Bytes()))[1] in (
        None,
        ("stop_reason", "eos, but the last sampled token is no EOS token ([0])"),
    )


def test_wrong_calls_are_answered() -> None:
    found = run(
        block("count", '{"by": "many"}'),
        block("count", '{"steps": 2}'),
        block("count", "[1]"),
        block("search", "wrong"),
        "```ruby\nputs 1\n```\n```output",
        "done",
    )
    texts = [observation for _, status, observation in shown(found) if status == "error"]
    assert len(texts) == 5
    assert "count: by: Input should be a valid integer" in texts[0]
    assert "count: steps: Extra inputs are not permitted" in texts[1]
    assert "no JSON object" in texts[2]
    assert texts[3] == "\nno such query\n```\n"
    assert texts[4] == "\n(no call found; the tools are python, count, search)\n```\n"


class Rows:
    """Gives what JSON does not know."""

    def __call__(self, kind: str):  # type: ignore[no-untyped-def]
        return {"int": np.int64(3), "bool": np.bool_(True), "array": np.arange(3), "exact": Fraction(1, 3), "set": {5}}[
            kind
        ]


@pytest.mark.parametrize(
    ("kind", "text"), [("int", "3"), ("bool", "true"), ("array", "[0, 1, 2]"), ("exact", '"1/3"'), ("set", "[5]")]
)
def test_results_that_json_does_not_know_are_shown(kind: str, text: str) -> None:
    session = OwnToolSession(tool_of_class(Rows, "rows"), PROMPT.problem)
    assert asyncio.run(session.call({"kind": kind})).text == text


def timed(call: Any) -> Any:
    """A decorator as users write them: not async itself."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return wrapped


class Decorated:
    """Doubles."""

    @timed
    async def __call__(self, x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x


def test_an_async_call_under_an_ordinary_decorator_is_awaited() -> None:
    session = OwnToolSession(tool_of_class(Decorated, "decorated"), PROMPT.problem)
    assert asyncio.run(session.call({"x": 21})).text == "42"


class Waits:
    """Takes the time that a thread takes."""

    timeout_s = 0.5
    released = threading.Event()

    def __call__(self, for_ever: bool = False) -> str:
        if for_ever:
            self.released.wait()
        time.sleep(0.1)
        return "here"


def test_waiting_for_a_thread_is_none_of_the_calls_time() -> None:
    tool = tool_of_class(Waits, "waits")

    async def many(count: int) -> list[Any]:
        sessions = [OwnToolSession(tool, PROMPT.problem) for _ in range(count)]
        return await asyncio.gather(*(session.call({}) for session in sessions), return_exceptions=True)

    found = asyncio.run(many(10 * THREADS))  # the last ones wait twice their limit
    assert [getattr(answer, "text", answer) for answer in found] == ["here"] * 10 * THREADS


def test_calls_that_never_return_do_not_hang_the_others() -> None:
    tool = tool_of_class(Waits, "waits")

    async def run() -> tuple[list[Any], Any]:
        sessions = [OwnToolSession(tool, PROMPT.problem) for _ in range(THREADS)]
        stuck = await asyncio.gather(*(s.call({"for_ever": True}) for s in sessions), return_exceptions=True)
        try:
            return stuck, await OwnToolSession(tool, PROMPT.problem).call({})
        except ToolFault as exc:
            return stuck, exc
        finally:
            Waits.released.set()

    stuck, further = asyncio.run(run())
    assert all("no answer within 0.5 s" in str(fault) for fault in stuck)
    assert f"all {THREADS} threads are taken" in str(further)


@pytest.mark.parametrize("query", ["slow", "broken"])
def test_what_the_tool_did_wrong_is_a_fault_that_no_policy_sees(query: str) -> None:
    with pytest.raises(ToolFault, match=r"search: (no answer within 0\.3 s|OSError: the index is gone)"):
        run(block("search", query))


def test_a_session_is_closed_when_its_attempt_is_cut_off() -> None:
    import their_tools

    async def main() -> None:
        settings = dataclasses.replace(SETTINGS, max_tool_calls=9, max_response_tokens=5000)
        script = Script(block("count", '{"by": 2}'), block("search", "broken"))
        with pytest.raises(ToolFault):
            await Episode(script, tool_of(*ALL), encode, settings).run(PROMPT, 0, seed=7)

    asyncio.run(main())
    assert their_tools.LOG == ["made", "closed after 2"]


def test_python_alone_is_the_papers_tool_itself() -> None:
    assert isinstance(tool_of("python"), PythonTool)


def test_a_tool_may_take_pythons_place() -> None:
    tool = tool_of("their_tools:Counter")
    assert isinstance(tool, FencedTools)
    assert tool.names == ("count",)


def test_schema_and_description() -> None:
    assert load_tool("their_tools:Search").schema == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Finds a text.\n\nIn the folder.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}},
                "required": ["query"],
            },
        },
    }
    assert with_tools("{tools}\n{problem}", tool_of(*ALL)) == (
        "- python: runs a program and shows what it prints\n"
        "- count(by: integer): Counts how often it was called.\n"
        "- search(query: string): Finds a text. In the folder.\n{problem}"
    )


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        (("their_tools:NoCall",), "no class with a __call__"),
        (("their_tools:NoDoc",), "has no docstring"),
        (("their_tools:NoTypes",), "argument x has no type"),
        (("their_tools:Star",), "cannot be filled by name"),
        (("their_tools:BadName",), "'two words' is not a word"),
        (("their_tools:Nothing",), "has no Nothing"),
        (("python", "own_tool:Calculator"), "two tools are called python"),
    ],
)
def test_what_is_no_tool_is_refused(tools: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    with pytest.raises(ConfigError, match=problem) as caught:
        tool_of(*tools)
    assert "\n" not in str(caught.value)


def test_settings_are_refused_when_they_are_read() -> None:
    for change in ({"tools": ["pyton"]}, {"tools": []}, {"tools": ["python", "python"]}, {"protocol": "chatt"}):
        with pytest.raises(ValueError, match=r"rollout\."):
            RolloutConfig.model_validate({**ROLLOUT.model_dump(), **change})


def test_a_protocol_of_ones_own() -> None:
    assert tool_of("python", protocol="their_tools:Xml").stop == ("</call>",)
    with pytest.raises(ConfigError, match="need `stop`"):
        tool_of("python", protocol="their_tools:Counter")


def texts(folder: Path) -> Path:
    folder.mkdir()
    (folder / "rivers.md").write_text("# Rivers\n\nThe Rhine rises in the Alps.\n\nThe Oder ends in the Baltic Sea.\n")
    (folder / "long.txt").write_text(" ".join(f"word{n}" for n in range(300)))
    row = {"title": "Moon", "contents": "The moon\nhas no rhine."}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps({"text": "Alps and peaks"}) + "\n")
    return folder


def test_search_finds_passages_of_a_folder(tmp_path: Path) -> None:
    index = Index(texts(tmp_path / "texts"))
    assert len(index.passages) == 3 + 3 + 2
    assert all(len(text.split()) <= 120 for _, text in index.passages)
    assert index.find("the Rhine and the Alps", 1) == [("rivers", "The Rhine rises in the Alps.")]
    assert {title for title, _ in index.find("rhine", 9)} == {"rivers", "Moon"}
    assert index.find("peaks", 99) == [("rows", "Alps and peaks")]
    assert index.find("nothing of that", 3) == index.find("", 3) == []


def test_search_as_a_tool(tmp_path: Path) -> None:
    config = {**ROLLOUT.model_dump(), "tools": ["search"], "search_folder": str(texts(tmp_path / "texts"))}
    tool = make_tool(RolloutConfig.model_validate(config), SandboxConfig(), Box())
    settings = dataclasses.replace(SETTINGS, max_tool_calls=9, max_response_tokens=5000)
    script = Script(
        block("search", "Baltic"), block("search", '{"query": "rhine", "num": 1}'), block("search", '{"query": "x", "num": 99}'),
        block("search", "zzz"), "done",
    )  # fmt: skip
    found = asyncio.run(Episode(script, tool, encode, settings).run(PROMPT, 0, seed=7))
    assert [observation for _, _, observation in shown(found)] == [
        "\n[rivers] The Oder ends in the Baltic Sea.\n```\n",
        "\n[Moon] The moon has no rhine.\n```\n",
        "\nsearch: num: Input should be less than or equal to 10\n```\n",
        "\n(nothing found)\n```\n",
    ]


def test_a_folder_that_cannot_be_searched_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        Index(tmp_path / "nothing")
    (tmp_path / "rows.jsonl").write_text('{"title": "no text"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no JSON object with `text` or `contents`"):
        Index(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        Index(tmp_path)
    for change in ({"tools": ["search"]}, {"search_folder": "texts"}):
        with pytest.raises(ValueError, match="if and only if"):
            RolloutConfig.model_validate({**ROLLOUT.model_dump(), **change})


def test_metrics_name_each_tool() -> None:
    found = run(block("count", '{"by": 2}'), block("search", "wrong"), "```ruby\n1\n```\n```output", "done")
    assert by_tool([(found, None)]) == {  # type: ignore[list-item]
        "tool/none/calls": 1.0,
        "tool/none/pass_ratio": 0.0,
        "tool/count/calls": 1.0,
        "tool/count/pass_ratio": 1.0,
        "tool/search/calls": 1.0,
        "tool/search/pass_ratio": 0.0,
    }
    only_python = run(block("python", "print(1)"), "done")
    assert only_python.tool_calls[0].status is ExecutionStatus.OK
    assert by_tool([(only_python, None)]) == {}  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```a\n1\n```\n```output", ("a", "1\n")),
        ("x```a\n1\n```\n", ("a", "1\n")),
        ("```a\n```\n", ("a", "\n")),
        ("```a\n1\n```\n```b\n2\n```\n", ("b", "2\n")),
        ("```a\n1\n```\n```b\n2\n", None),
        ("```ab\n1\n```\n", None),
        ("```a\n1\n```c\n2\n```", ("a", "1\n")),
        ("no block", None),
    ],
)
def test_the_last_closed_block_counts(text: str, found: tuple[str, str] | None) -> None:
    assert last_block(text, ("a", "b")) == found


class Plain:
    """No type that pydantic knows."""


def made(**body: Any) -> type:
    return type("Made", (), {"__doc__": "Does.", **body})


def test_types_that_have_no_schema_are_one_line() -> None:
    async def forward(self: Any, a: Nope) -> str: ...  # type: ignore[name-defined]  # noqa: F821
    async def plain(self: Any, a: Plain) -> str: ...
    async def function(self: Any, a: Callable[[], int]) -> str: ...
    async def reserved(self: Any, model_dump: str) -> str: ...
    async def hidden(self: Any, _x: str) -> str: ...

    for call, message in (
        (forward, "is not there"), (plain, "have no schema"), (function, "have no schema"), (reserved, "pydantic keeps"),
        (hidden, "pydantic keeps"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            tool_of_class(made(__call__=call), "their:Tool")


def test_a_tool_without_arguments_and_one_that_runs_out() -> None:
    async def nothing(self: Any) -> str:
        return "called"

    def runs_out(self: Any) -> str:
        return next(iter(()))

    problem = Problem("p", "", "", "")
    session = OwnToolSession(tool_of_class(made(__call__=nothing), "their:Tool"), problem)
    assert asyncio.run(session.call("\n")).text == "called"
    session = OwnToolSession(tool_of_class(made(__call__=runs_out), "their:Tool"), problem)
    with pytest.raises(ToolFault, match="StopIteration"):
        asyncio.run(session.call("{}"))


def test_search_reads_what_editors_write(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        '﻿{"text": "one\u2028river"}\n{"text": null}\n{"text": "", "title": null}\n'.encode()
    )
    assert Index(tmp_path).passages == [("a", "one river")]
    (tmp_path / "a.jsonl").write_text('{"text": "the a of"}\n')
    with pytest.raises(DataError, match="no words to search by"):
        Index(tmp_path)
