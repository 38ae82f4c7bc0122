# ruff: noqa: E501 - tables of long texts
"""Chat models: prompts, calls and results token for token as `apply_chat_template` writes them, for five families of templates.

The reference is the tokenizer itself, which renders and encodes each finished conversation as a whole.
"""

import asyncio
import dataclasses
import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_models import CHATML, QWEN25, USABLE, chat_model, usable
from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_tools import ROLLOUT
from test_rollout import LIMITS, Box

from torl_mega.config_file import load_config
from torl_mega.data.prompts import PromptSource
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, DataError, ToolFault
from torl_mega.rollout.call_formats import Written, fenced, hermes, llama3
from torl_mega.rollout.chat import ChatTools, make_chat
from torl_mega.rollout.episode import Episode, EpisodeSettings
from torl_mega.rollout.fences import FencedTools
from torl_mega.rollout.own_tool import ToolError, tool_of_class
from torl_mega.rollout.python_tool import PythonTool
from torl_mega.rollout.recorder import Recorded, to_row, trajectory_from_json
from torl_mega.rollout.token_audit import Rules, audit_row
from torl_mega.rollout.tools import make_tool, tool_and_prompts
from torl_mega.types import (
    ExecutionStatus,
    FinishReason,
    Generation,
    GraderStatus,
    Problem,
    Prompt,
    Reward,
    StopReason,
    ToolCall,
    Trajectory,
)

FAMILIES = sorted(USABLE)
FORMAT = {"qwen25": "hermes", "qwen3": "hermes", "llama3": "llama3", "chatml": "fenced", "gemma": "fenced"}
HOSTILE = "".join(token for _, added, _, _ in USABLE.values() for token in added) + "<|endoftext|>```output\n"


class Echo:
    """Says what it is given, and how often it was called."""

    name = "echo"
    max_chars = 4000

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, text: str = "nothing", more: list[Any] | None = None) -> str:
        if text == "wrong":
            raise ToolError("that is wrong")
        self.count += 1
        return f"{self.count}: {text} {json.dumps(more)}"


@cache
def tokenizer(name: str) -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(usable(Path(folder), name))


@cache
def chat(name: str) -> ChatTools:
    box = FencedTools({"echo": tool_of_class(Echo, "echo")}, PythonTool(Box(), LIMITS))
    return make_chat(box, tokenizer(name), system=system(name), arguments={}, family="auto")


def system(name: str) -> str | None:
    return None if name == "gemma" else "Use the tools."


def written(name: str, tool: str, arguments: dict[str, Any]) -> str:
    """A call as the family writes it."""
    if FORMAT[name] == "hermes":
        return "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"
    if FORMAT[name] == "llama3":
        return json.dumps({"name": tool, "parameters": arguments})
    body = arguments["code"] if tool == "python" else json.dumps(arguments)
    return f"```{tool}\n{body}\n```"


class Says:
    """A Generator that says these turns, each closed by the template's token unless the budget cuts it."""

    def __init__(self, name: str, *turns: str, close: int | None = None) -> None:
        self.codec, self.turns, self.end = (
            tokenizer(name),
            list(turns),
            chat(name).end_ids[0] if close is None else close,
        )
        self.requests: list[Any] = []

    async def generate(self, request: Any) -> Generation:
        self.requests.append(request)
        ids = (*self.codec.encode_with_special(self.turns.pop(0)), self.end)
        finish = FinishReason.EOS if len(ids) <= request.max_new_tokens else FinishReason.LENGTH
        ids = ids[: request.max_new_tokens]
        return Generation(ids, (-0.5,) * len(ids), (0,) * len(ids), self.codec.decode(ids), finish)


def attempt(
    name: str, *turns: str, problem: str = "What?", calls: int = 9, room: int = 4000, **more: Any
) -> Trajectory:
    tools = chat(name)
    prompt = Prompt(Problem("p/1", problem, "1", "p"), tools.template.prompt(problem))
    says = Says(name, *turns, **more)
    episode = Episode(says, tools, tokenizer(name).encode, EpisodeSettings(1.0, 1.0, room, calls))
    found = asyncio.run(episode.run(prompt, 0, seed=1))
    assert all(r.stop == () and r.stop_token_ids == tools.end_ids for r in says.requests)
    return found


def whole(name: str, problem: str, found: Trajectory) -> tuple[tuple[int, ...], str]:
    """Ids and text of the conversation, by the tokenizer's own `apply_chat_template`, up to the last turn's closing token."""
    tools, hf = chat(name), tokenizer(name)._hf
    messages: list[dict[str, Any]] = [{"role": "system", "content": system(name)}] if system(name) else []
    messages.append({"role": "user", "content": problem})
    for turn in found.turns:
        messages.append({"role": "assistant", "content": turn.text.removesuffix(tools.template.closing)})
        if not turn.observation_ids:
            continue
        if tools.family == "fenced":
            content = "\n".join(f"```output\n{call.observation}\n```" for call in turn.tool_calls)
            messages.append({"role": "user", "content": content})
        else:
            messages += [{"role": "tool", "name": c.tool, "content": c.observation} for c in turn.tool_calls]
    schemas = None
    if tools.family != "fenced":
        from torl_mega.rollout.chat import Python

        schemas = [tool_of_class(Python, "python").schema, tools.box.tools["echo"].schema]
    text = hf.apply_chat_template(messages, tools=schemas, tokenize=False, date_string="26 Jul 2024")
    text = text[: text.rindex(tools.template.closing) + len(tools.template.closing)]
    return tuple(hf.encode(text, add_special_tokens=False)), text


def audited(name: str, found: Trajectory, change: Any = None) -> tuple[str, str] | None:
    reward = Reward(1.0, True, GraderStatus.OK, "1", {"answer": 1.0})
    row = json.loads(json.dumps(to_row(0, Recorded(0, found, reward, 0.5))))
    assert trajectory_from_json(row)[0] == found
    if change is not None:
        change(row["turns"])
    tools = chat(name)
    return audit_row(row, Rules(tokenizer(name), chat=tools, prompts=lambda p: tools.template.prompt(p.problem)))[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_what_the_template_makes_of_it(name: str) -> None:
    assert chat(name).family == FORMAT[name]
    two = [written(name, "echo", {"text": "a", "more": [1, {"x": None}]}), written(name, "echo", {})]
    turns = ["; ".join(two) if name == "llama3" else "First.\n" + "\n".join(two), written(name, "python", {"code": "print(42)"}),
             "So \\boxed{42}"]  # fmt: skip
    if name == "qwen3":
        turns[0] = "<think>\nI might <tool_call>{}</tool_call>\n</think>\n\n" + turns[0]
    found = attempt(name, *turns)
    assert [call.observation for call in found.tool_calls] == ['1: a [1, {"x": null}]', "2: nothing null", "42"]
    assert [call.tool for call in found.tool_calls] == ["echo", "echo", "python"]
    assert found.stop_reason is StopReason.EOS
    # the last turn is no longer thought of as one that goes on, so Qwen 3 would add an empty thought to it: leave it out
    ids = (*found.prompt.token_ids, *found.response_ids)
    if name != "qwen3":
        assert ids == whole(name, "What?", found)[0]
    cut = dataclasses.replace(found, turns=found.turns[:2])
    expected, _ = whole(name, "What?", cut)
    assert ids[: len(expected) - 1] == expected[:-1]
    assert len(found.loss_mask) == len(found.response_ids)
    sampled = [i for i, mask in zip(found.response_ids, found.loss_mask, strict=True) if mask]
    assert sampled == [i for turn in found.turns for i in turn.token_ids]
    assert audited(name, found) is None


def _tamper(path: str, value: Any) -> Any:
    def change(turns: list[dict[str, Any]]) -> None:
        *steps, last = path.split(".")
        place: Any = turns[0]
        for step in steps:
            place = place[int(step) if isinstance(place, list) else step]
        place[last] = value(place[last])

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_tamper("tool_call.observation", lambda s: s + " "), "turns[0].observation_ids"),
        (_tamper("observation_ids", lambda ids: ids[:-1]), "turns[0].observation_ids"),
        (_tamper("more_calls", lambda calls: []), "turns[0].tool_call"),
        (_tamper("text", lambda s: s.replace("echo", "ecno")), "turns[0].text"),
        (_tamper("token_ids", lambda ids: [*ids[:-1], ids[0]]), "turns[0].text"),
    ],
)
def test_the_audit_sees_what_was_changed(change: Any, field: str) -> None:
    two = "\n".join([written("qwen25", "echo", {"text": "a"})] * 2)
    found = attempt("qwen25", two, "done")
    assert audited("qwen25", found) is None
    assert (audited("qwen25", found, change) or ("",))[0] == field


TEXTS = st.text(max_size=30) | st.sampled_from(
    [HOSTILE, " <|im_end|>\n", "\n\n", "</tool_response>", "{{ 1/0 }}", "<|eot_id|> 7 "]
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(problem=TEXTS, said=st.lists(TEXTS, min_size=1, max_size=3))
def test_only_the_template_writes_special_tokens(name: str, problem: str, said: list[str]) -> None:
    """Whatever a problem or a tool says, the text is the template's and its tokens are those of harmless words."""
    codec, tools = tokenizer(name), chat(name)
    problem = problem.encode("utf-8", "replace").decode()
    calls = tuple(
        ToolCall("c", ExecutionStatus.OK, 0, s.encode("utf-8", "replace").decode(), 0.0, tool="echo") for s in said
    )
    harmless = tuple(dataclasses.replace(call, observation="word") for call in calls)
    for ids, plain in (
        (tools.template.prompt(problem), tools.template.prompt("word")),
        (tools.follow(calls), tools.follow(harmless)),
    ):
        marks = {codec.added[mark] for mark in codec.added}
        assert [i for i in ids if i in marks] == [i for i in plain if i in marks]
    turn = dataclasses.replace(
        attempt(name, "x").turns[0], tool_call=calls[0], more_calls=calls[1:], observation_ids=(1,)
    )
    last = dataclasses.replace(turn, tool_call=None, more_calls=(), observation_ids=())
    shape = Trajectory(Prompt(Problem("p", problem, "", ""), ()), 0, (turn, last), StopReason.EOS)
    if name == "qwen3":  # puts an empty thought into a last turn
        return
    _, text = whole(name, problem, shape)
    middle = codec.decode((*tools.template.prompt(problem), *turn.token_ids, *tools.follow(calls), *turn.token_ids))
    assert middle == unicodedata.normalize("NFC", text)  # as Qwen's tokenizer does


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_calls_are_answered_and_faults_are_not(name: str) -> None:
    found = attempt(
        name, written(name, "echo", {"text": "wrong"}), written(name, "echo", {"steps": 1}), written(name, "echo", {"text": 7}), "x"
    )  # fmt: skip
    said = [(call.observation, call.status) for call in found.tool_calls]
    assert said[0] == ("that is wrong", ExecutionStatus.ERROR)
    assert "echo: steps: Extra inputs are not permitted" in said[1][0]
    assert "text" in said[2][0]
    assert audited(name, found) is None
    if FORMAT[name] != "fenced":
        unknown = written(name, "ec", {})
        broken = "<tool_call>\n{1}\n</tool_call>" if FORMAT[name] == "hermes" else '{"name": "echo", "parameters": {'
        surrogates = written(name, "echo", {"text": "x"}).replace('"x"', '"\\ud800"')
        found = attempt(name, unknown, broken, surrogates, written(name, "python", {"cod": "1"}), "x")
        said = [call.observation for call in found.tool_calls]
        assert "there is no tool 'ec'; the tools are python, echo" in said[0]
        assert all("no JSON object" in text for text in said[1:3])
        assert "one argument is needed, code" in said[3]
        assert all(call.code == "" and call.status is ExecutionStatus.ERROR for call in found.tool_calls)
        assert audited(name, found) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_limits_are_exact(name: str) -> None:
    call = written(name, "echo", {"text": "a"})
    several = "; ".join([call] * 3) if name == "llama3" else "\n".join([call] * 3)
    found = attempt(name, several, call, calls=2)
    assert [c.observation for c in found.tool_calls][:2] == ["1: a null", "2: a null"]
    assert "no more calls" in found.tool_calls[2].observation
    assert len(found.turns) == 2
    assert found.turns[1].tool_call is None  # nothing was left: whatever it says is the answer
    assert found.stop_reason is StopReason.EOS
    full = len(attempt(name, call, "x").response_ids)
    for room in range(1, full + 1):
        found = attempt(name, call, "x", room=room)
        assert len(found.response_ids) <= room
        assert audited(name, found) is None
        if room < full:
            assert found.stop_reason is StopReason.LENGTH
    cut = attempt(name, call, room=len(tokenizer(name).encode_with_special(call)) - 1)
    assert cut.tool_calls == ()


def test_a_turn_that_ends_otherwise_is_the_answer() -> None:
    """Qwen's `<|endoftext|>` closes no turn: what would follow it is no conversation."""
    end = tokenizer("qwen25").added["<|endoftext|>"]
    found = attempt("qwen25", written("qwen25", "echo", {"text": "a"}), close=end)
    assert found.tool_calls == ()
    assert found.stop_reason is StopReason.EOS


def test_llamas_end_of_a_message_closes_a_call_too() -> None:
    """Llama 3.1 ends a call by `<|eom_id|>` where a result is to follow (Meta's prompt format, "Environment: ipython")."""
    name = "llama3"
    eom = tokenizer(name).added["<|eom_id|>"]
    assert chat(name).end_ids == (tokenizer(name).added["<|eot_id|>"], eom)
    found = attempt(name, "<|python_tag|>" + written(name, "echo", {"text": "a"}), "\\boxed{1}", close=eom)
    assert [call.observation for call in found.tool_calls] == ["1: a null"]
    assert found.turns[0].token_ids[-1] == eom
    assert audited(name, found) is None
    usual = attempt(name, "<|python_tag|>" + written(name, "echo", {"text": "a"}), "\\boxed{1}")
    assert found.turns[0].observation_ids == usual.turns[0].observation_ids


@pytest.mark.parametrize(
    ("read", "turn", "calls"),
    [
        (hermes, 'a <tool_call>{"name": "f"}</tool_call> b', [Written("f", {})]),
        (hermes, '<tool_call>{"name": "f", "arguments": {"s": "</tool_call><tool_call>"}}</tool_call>',
         [Written("f", {"s": "</tool_call><tool_call>"})]),
        (hermes, '<think><tool_call>{"name": "f"}</tool_call>', []),
        (hermes, '<tool_call>{"name": "f"}', [Written("f", {})]),
        (hermes, '<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', [Written("f", {"x": 1})]),
        (hermes, '<tool_call>{"name": "f", "args": {"x": 1}}</tool_call>', [Written("f", "", "the call of f has no arguments")]),
        (hermes, '<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', [Written("f", {}), Written("g", {})]),
        (hermes, '<tool_call>{"name": "f", "arguments": {"s": "a </think> <think>"}}</tool_call> </think>', [Written("f", {"s": "a </think> <think>"})]),
        (hermes, '<think>a</think> <tool_call>{"name": "f"}</tool_call> <think> maybe', [Written("f", {})]),
        (llama3, '{"parameters": {"x": 1}, "name": "f"}', [Written("f", {"x": 1})]),
        (llama3, 'I call it. <|python_tag|>{"name": "f", "parameters": {}}<|python_tag|>{"name": "g", "parameters": {}}', [Written("f", {}), Written("g", {})]),
        (llama3, '{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}', [Written("f", {}), Written("g", {})]),
        (llama3, "{'name': 'f', 'parameters': {}}", [Written("", "", "the call is no JSON object")]),
        (llama3, '{"a": 1}', []),
        (fenced(["f"]), "```f\r\n1\r\n```\r\n", [Written("f", "1\n")]),
        (hermes, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', [Written("f", "", "the arguments of f are no JSON object")]),
        (hermes, "<tool_call>" + "[" * 100_000, [Written("", "", "the call is no JSON object between <tool_call> and </tool_call>")]),
        (llama3, ' <|python_tag|>{"name": "f", "parameters": {"x": 1}};\n{"name": "g", "arguments": {}}', [Written("f", {"x": 1}), Written("g", {})]),
        (llama3, '{"type": "function", "function": {"name": "f", "parameters": {}}}', [Written("f", {})]),
        (llama3, '{"type": "function", "function": "f", "parameters": {"a": 2}}', [Written("f", {"a": 2})]),
        (llama3, "{1, 2} is the set", []),
        (llama3, 'The call {"name": "f", "parameters": {}}', []),
        (llama3, '{"name": "f", "parameters": {}} and so', [Written("f", {})]),
        (fenced(["f", "g"]), "x\n```f\n1\n```\n```h\n2\n```\n```g\n3", [Written("f", "1\n")]),
        (fenced(["f"]), "```f\n```", [Written("f", "\n")]),
    ],
)  # fmt: skip
def test_calls_are_read(read: Any, turn: str, calls: list[Written]) -> None:
    assert read(turn) == calls


BROKEN = {
    "forgets thoughts": (
        CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +"), r"with thinking in it, message 2|not append-only: with a message of the role user after it, message 2 \(assistant\)"),
    "changes what was said": (
        CHATML.replace("message['content'] +", "(message['content'] if loop.last else message['content'] | upper) +"), r"message 2 \(assistant\) is not written as it was sampled"),
    "adds to earlier turns": (
        CHATML.replace("{{- '<|im_start|>' +", "{{- '<|im_start|>' + ('old ' if not loop.last and message.role == 'assistant' else '') +"),
        r"message 2 \(assistant\) is not written as it was sampled"),
    "repeats the problem": (CHATML + "{{ messages[0]['content'] }}", "leaves a message out, repeats one"),
    "counts its turns": (
        CHATML.replace("message['role'] + '\\n'", "message['role'] + loop.index | string + '\\n'"), r"message 4 \(user\)|message 2"),
    "refuses": (CHATML.replace("{{-", "{% if loop.index == 3 %}{{ raise_exception('no') }}{% endif %}{{-", 1), r"refuses message 3 \(user\): no"),
    "closes with a word": (CHATML.replace("'<|im_end|>\\n'", "' END\\n'"), "closes the assistant's turn with ' END"),
    "is no template": ("{% for %}", "refuses message"),
}  # fmt: skip


@pytest.mark.parametrize("why", sorted(BROKEN))
def test_a_template_that_cannot_be_used_is_refused(why: str, tmp_path: Path) -> None:
    template, message = BROKEN[why]
    codec = Tokenizer(chat_model(tmp_path / "m", template, {"<|im_start|>": True, "<|im_end|>": True}, "<|im_end|>"))
    box = FencedTools({}, PythonTool(Box(), LIMITS))
    with pytest.raises((DataError, ConfigError), match=message):
        make_chat(box, codec, system=None, arguments={}, family="auto")


SPECIAL = {"<|im_start|>": True, "<|im_end|>": True}
MORE_BROKEN = {
    "keeps the last thought alone": (
        "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        + CHATML.replace("message['content'] +", "(message['content'].split('</think>')[-1] if loop.index0 != ns.last else message['content']) +"),
        "not append-only"),
    "other thoughts": (CHATML.replace("message['content'] +", "(message['content'] if loop.last else message['content'].split('[/THINK]')[-1]) +"), "not append-only"),
}  # fmt: skip


@pytest.mark.parametrize("why", sorted(MORE_BROKEN))
def test_a_template_that_forgets_thoughts_is_refused(why: str, tmp_path: Path) -> None:
    template, message = MORE_BROKEN[why]
    codec = Tokenizer(chat_model(tmp_path / "m", template, SPECIAL, "<|im_end|>"))
    with pytest.raises(DataError, match=message):
        make_chat(FencedTools({}, PythonTool(Box(), LIMITS)), codec, system=None, arguments={}, family="fenced")


def made(tmp_path: Path, template: str, added: dict[str, bool], **more: Any) -> tuple[Tokenizer, ChatTools]:
    codec = Tokenizer(chat_model(tmp_path / "m", template, added, "<|im_end|>"))
    return codec, make_chat(
        FencedTools({}, PythonTool(Box(), LIMITS)), codec, **{"system": None, "arguments": {}, "family": "auto", **more}
    )


def test_a_row_whose_system_message_the_template_cannot_keep_is_refused(tmp_path: Path) -> None:
    upper = "(message['content'] | upper if message.role == 'assistant' and not loop.last and messages[0].role == 'system' else message['content']) +"
    _, tools = made(tmp_path, CHATML.replace("message['content'] +", upper), SPECIAL)
    assert tools.template.prompt("abc")
    with pytest.raises(DataError, match="not append-only"):
        tools.template.prompt("abc", "sys")


def test_marks_that_do_not_look_like_marks_are_the_templates_alone(tmp_path: Path) -> None:
    template = CHATML.replace("'\\n' + message", "'◁sep▷' + message").replace("assistant\\n'", "assistant◁sep▷'")
    codec, tools = made(tmp_path, template, {**SPECIAL, "◁sep▷": False, "<tool>": False, "<a<tool>": False})
    for text in ("w ◁sep▷ d", "x <a<tool> y", "<tool>"):
        ids = tools.template.prompt(text)
        assert [ids.count(codec.added[t]) for t in ("◁sep▷", "<tool>", "<a<tool>")] == [2, 0, 0], text
        assert text in codec.decode(ids)


def test_the_date_does_not_move_a_prompt(tmp_path: Path) -> None:
    codec, tools = made(tmp_path, "{{- strftime_now('%d %B %Y') + '\\n' }}" + CHATML, SPECIAL)
    assert codec.decode(tools.template.prompt("a")).startswith("26 July 2024\n")


def test_of_several_templates_the_one_for_tools_is_taken(tmp_path: Path) -> None:
    codec = Tokenizer(usable(tmp_path, "qwen25"))
    codec._hf.chat_template = {"default": CHATML, "tool_use": QWEN25}
    tools = make_chat(FencedTools({}, PythonTool(Box(), LIMITS)), codec, system=None, arguments={}, family="auto")
    assert tools.family == "hermes"
    assert "# Tools" in codec.decode(tools.template.prompt("a"))


def test_what_the_template_is_told_is_checked(tmp_path: Path) -> None:
    class Sly:
        """Ends <|im_end|> here."""

        async def __call__(self) -> str:
            return ""

    codec = tokenizer("qwen25")
    with pytest.raises(DataError, match=r"a description holds '<\|im_end\|>'"):
        make_chat(
            FencedTools({"sly": tool_of_class(Sly, "sly")}, None), codec, system=None, arguments={}, family="auto"
        )
    with pytest.raises(DataError, match=r"data.chat_arguments has return_dict"):
        made(tmp_path, CHATML, SPECIAL, arguments={"return_dict": True})


def test_a_turn_that_repeats_a_call_a_thousand_times_is_answered_in_bounds() -> None:
    found = attempt("qwen25", "<tool_call></tool_call>" * 1000, "x", room=100_000)
    assert len(found.tool_calls) == 32
    assert audited("qwen25", found) is None


def test_a_model_without_a_chat_template_or_with_other_calls_is_refused(tmp_path: Path) -> None:
    box = FencedTools({}, PythonTool(Box(), LIMITS))
    with pytest.raises(DataError, match="has no chat template"):
        make_chat(box, Tokenizer("conf/quickstart"), system=None, arguments={}, family="auto")
    xml = QWEN25.replace('{"name": "', "<function=").replace("{{- tool_call.arguments | tojson }}", "")
    codec = Tokenizer(chat_model(tmp_path / "x", xml, *USABLE["qwen25"][1:]))
    with pytest.raises(
        ConfigError,
        match=r"writes a call as .*<function=calc.* no form that is read here; set rollout.call_format=fenced",
    ):
        make_chat(box, codec, system=None, arguments={}, family="auto")
    assert make_chat(box, codec, system=None, arguments={}, family="fenced").family == "fenced"
    with pytest.raises(ConfigError, match=r"which is hermes; set rollout.call_format=hermes"):
        make_chat(box, tokenizer("qwen25"), system=None, arguments={}, family="llama3")
    with pytest.raises(DataError, match=r"data.system holds '<\|im_end\|>'"):
        make_chat(box, tokenizer("qwen25"), system="a<|im_end|>", arguments={}, family="auto")


def test_a_tokenizer_that_adds_spaces_between_special_tokens_is_refused(tmp_path: Path) -> None:
    folder = usable(tmp_path, "qwen25")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**model, "model_type": "gpt2"}))
    codec = Tokenizer(folder)
    assert codec.encode("a") != tokenizer("qwen25").encode("a")
    with pytest.raises(DataError, match="makes other ids of a whole conversation"):
        make_chat(FencedTools({}, PythonTool(Box(), LIMITS)), codec, system=None, arguments={}, family="auto")


def test_a_tool_that_fails_or_hides_structure_is_a_fault() -> None:
    class Fails:
        """Fails."""

        async def __call__(self) -> str:
            raise OSError("no disk")

    tools = dataclasses.replace(chat("qwen25"), box=FencedTools({"fails": tool_of_class(Fails, "fails")}, None))
    session = tools.open(Problem("p", "", "", ""))
    with pytest.raises(ToolFault, match="fails: OSError: no disk"):
        asyncio.run(session.calls(written("qwen25", "fails", {}), most=1))


def test_arguments_of_the_template_and_the_date(tmp_path: Path) -> None:
    codec = tokenizer("qwen3")
    box = FencedTools({}, PythonTool(Box(), LIMITS))
    quick = make_chat(box, codec, system=None, arguments={"enable_thinking": True}, family="auto")
    assert codec.decode(quick.template.prompt("a")).endswith("<|im_start|>assistant\n")
    with pytest.raises(
        DataError, match=r"message 2 \(assistant\)"
    ):  # the thought that the prompt brings is dropped later
        make_chat(box, codec, system=None, arguments={"enable_thinking": False}, family="auto")
    assert "Today Date: 26 Jul 2024" in codec.decode(chat("llama3").template.prompt("a"))


def test_the_config_makes_it(tmp_path: Path) -> None:
    model = usable(tmp_path, "qwen25")
    chosen = ["data.template=chat", f"model.path={model}", "data.system='Say {tools}'"]
    config = load_config("conf/base.yaml", [*chosen, "rollout.protocol=chat", "data.train=arithmetic:1"])
    tools, prompts = tool_and_prompts(config, Tokenizer(model))
    assert isinstance(tools, ChatTools)
    text = Tokenizer(model).decode(prompts(Problem("p", " 1 + 1 ", "2", "a")))
    assert "Say - python: runs a program" in text
    assert '"name": "python"' in text
    assert text.endswith("<|im_start|>user\n 1 + 1 <|im_end|>\n<|im_start|>assistant\n")
    plain, prompts = tool_and_prompts(load_config("conf/base.yaml", ["data.template=chat", f"model.path={model}", "data.train=arithmetic:1"]), Tokenizer(model))  # fmt: skip
    assert isinstance(plain, PythonTool)  # the paper's fences in an assistant's turn
    assert Tokenizer(model).decode(prompts(Problem("p", "1", "2", "a"))).startswith("<|im_start|>user\n1<|im_end|>")
    with pytest.raises(ConfigError, match=r"needs data.template = chat"):
        load_config("conf/base.yaml", ["rollout.protocol=chat", "data.train=arithmetic:1"])
    with pytest.raises(ConfigError, match=r"go with data.template = chat"):
        load_config("conf/base.yaml", ["data.system=x", "data.train=arithmetic:1"])


def test_a_system_message_of_the_row_takes_the_place_of_the_common_one(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "system", "content": "Row <|im_end|> says."}, {"role": "user", "content": "1+1"}],
        "label": "2",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"problem": "2+2", "answer": "4"}) + "\n")
    model = usable(tmp_path, "qwen25")
    given = [
        "data.template=chat",
        f"model.path={model}",
        "data.system=Common.",
        f"data.train={tmp_path}/rows.jsonl",
        "rollout.protocol=chat",
    ]
    config = load_config("conf/base.yaml", given)
    codec = Tokenizer(model)
    _, prompts = tool_and_prompts(config, codec)
    source = PromptSource(config.data.model_copy(update={"shuffle": False}), prompts, seed=0)
    own, common = (codec.decode(prompt.token_ids) for prompt in source.next(2))
    assert own.startswith("<|im_start|>system\nRow <|im_end|> says.\n\n# Tools")
    assert common.startswith("<|im_start|>system\nCommon.\n\n# Tools")
    end = codec.added["<|im_end|>"]
    both = [
        prompts(problem).count(end)
        for problem in (Problem("p", "1", "", "", {"system": "<|im_end|>"}), Problem("p", "1", "", ""))
    ]
    assert both == [2, 2]  # one that is written is text


def test_a_system_message_that_a_plain_template_leaves_out_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}], "label": "2"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = load_config("conf/base.yaml", [f"data.train={tmp_path}/rows.jsonl"])
    PromptSource(config.data, lambda problem: (1,), seed=0)
    assert "1 problems bring a system message, which data.template leaves out" in caplog.text


def test_text_protocols_never_hear_of_it() -> None:
    tool = make_tool(ROLLOUT, load_config("conf/base.yaml", ["data.train=arithmetic:1"]).sandbox, Box())
    assert not isinstance(tool, ChatTools)


def test_a_thought_that_the_template_begins_is_one(tmp_path: Path) -> None:
    """A generation prompt that ends in `<think>`, in front of every turn alike: a call in the thought is none."""
    folder = usable(tmp_path, "qwen25")
    path = folder / "chat_template.jinja"
    opened = path.read_text().replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    said = "+ message.role + '\\n' +"
    opened = opened.replace(said, f"{said} ('<think>\\n' if message.role == 'assistant' else '') +")
    assert opened.count("<think>") == 2
    path.write_text(opened)
    box = FencedTools({"echo": tool_of_class(Echo, "echo")}, None)
    tools = make_chat(box, Tokenizer(folder), system="s", arguments={}, family="fenced")
    call = "\n```echo\n{}\n```\n"
    assert tools.template.begun == "<think>"
    assert tools.calls_of(f"perhaps {call}") == []
    assert tools.calls_of(f"perhaps {call}</think>\n{call}") == [Written("echo", "{}\n")]
