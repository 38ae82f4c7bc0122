"""Pages and audit on trajectories that the shipped base model really sampled, and on hostile and damaged ones."""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import gzip
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from transformers import Qwen2ForCausalLM

from torl_mega.data.arithmetic import problems
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import DataError
from torl_mega.rollout.audit_rules import rules_of
from torl_mega.rollout.episode import Episode, EpisodeSettings
from torl_mega.rollout.python_tool import Limits, PythonTool
from torl_mega.rollout.recorder import Recorded, read_rows, to_row, write_step
from torl_mega.rollout.token_audit import Rules, audit_files, audit_row
from torl_mega.types import (
    ExecutionRequest,
    ExecutionResult,
    ExecutionStatus,
    FinishReason,
    Generation,
    GenerationRequest,
    GraderStatus,
    Group,
    Prompt,
    Reward,
    ToolCall,
    Trajectory,
    Turn,
)
from torl_mega.view.command import Options, view
from torl_mega.view.spans import Pieces

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from tiny_base_traces import TEMPLATE, interpret  # noqa: E402

MODEL = ROOT / "conf/quickstart"
STEP = 3
Row = dict[str, Any]


class ModelGenerator:
    """A Generator over the shipped model in plain PyTorch, one token at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = Qwen2ForCausalLM.from_pretrained(MODEL).eval()
        self._tokenizer = tokenizer

    @torch.no_grad()
    async def generate(self, request: GenerationRequest) -> Generation:
        rng = torch.Generator().manual_seed(request.seed)
        ids, logprobs, text = list[int](), list[float](), ""
        while len(ids) < request.max_new_tokens:
            row = torch.tensor([[*request.token_ids, *ids]])
            scores = self._model(row).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial(scores.exp(), 1, generator=rng)))
            logprobs.append(float(scores[ids[-1]]))
            text = self._tokenizer.decode(ids)
            if ids[-1] == self._tokenizer.eos_id:
                return self._done(ids, logprobs, text, FinishReason.EOS)
            if any(text.endswith(stop) for stop in request.stop):
                return self._done(ids, logprobs, text, FinishReason.STOP_STRING)
        return self._done(ids, logprobs, text, FinishReason.LENGTH)

    def _done(self, ids: list[int], logprobs: list[float], text: str, finish: FinishReason) -> Generation:
        return Generation(tuple(ids), tuple(logprobs), (STEP,) * len(ids), text, finish)


class Sums:
    """A Sandbox for programs that only print sums: nothing is executed."""

    async def run(self, request: ExecutionRequest) -> ExecutionResult:
        shown, passed = interpret(request.code)
        status = ExecutionStatus.OK if passed else ExecutionStatus.ERROR
        out, err = (shown, "") if passed else ("", shown)
        return ExecutionResult(status, 0 if passed else 1, out, err, 0.012, 0.01, 9.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


@pytest.fixture(scope="module")
def groups(tokenizer: Tokenizer) -> tuple[Group, ...]:
    """Three problems, six attempts each, sampled with C = 1."""
    tool = PythonTool(Sums(), Limits(wall_s=5, cpu_s=5, memory_mb=64, output_bytes=999))
    episode = Episode(ModelGenerator(tokenizer), tool, tokenizer.encode, EpisodeSettings(1.0, 1.0, 128, 1))
    return tuple(
        _group([asyncio.run(episode.run(prompt, i, seed=1)) for i in range(6)])
        for p in islice(problems(4), 3)
        for prompt in [Prompt(p, tokenizer.encode(TEMPLATE.format(problem=p.problem)))]
    )


def _group(trajectories: list[Trajectory]) -> Group:
    return Group(trajectories[0].prompt, tuple(trajectories), tuple(_reward(t) for t in trajectories))


def _reward(trajectory: Trajectory) -> Reward:
    boxed = re.findall(r"\\boxed\{(-?\d+)\}", trajectory.response_text)
    correct = bool(boxed) and boxed[-1] == trajectory.prompt.problem.answer
    value = 1.0 if correct else -1.0
    status = GraderStatus.OK if boxed else GraderStatus.NO_ANSWER
    return Reward(value, correct, status, boxed[-1] if boxed else None, {"answer": value})


def _write(run: Path, groups: tuple[Group, ...], step: int = STEP) -> Path:
    config = {"config_hash": "0", "config": {"model": {"path": str(MODEL)}}}
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config))
    return write_step(run / "trajectories", step, groups, [0.5] * sum(len(g.trajectories) for g in groups))


def _data(folder: Path) -> dict[str, Any]:
    """Every data file of a page, by name."""
    found = {}
    for path in sorted((folder / "data").rglob("*.js")):
        said = re.fullmatch(r'torl\.put\("([^"]+)","([A-Za-z0-9+/=]+)"\);\n', path.read_text())
        assert said, f"{path} holds more than one call with letters"
        assert said[1] == str(path.relative_to(folder / "data").with_suffix(""))
        found[said[1]] = json.loads(gzip.decompress(base64.b64decode(said[2])))
    return found


# ------------------------------------------------------------------------------------------------ view


def test_the_data_hold_every_token_of_every_trajectory(
    tmp_path: Path, groups: tuple[Group, ...], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "run", groups)
    assert view(tmp_path / "run") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "run/view/index.html"
    data = _data(path.parent)
    index, chunk = data["run/step_00003.index"], data["run/step_00003.000"]
    shown = [(t, r) for g in groups for t, r in zip(g.trajectories, g.rewards, strict=True)]
    prompts = dict(chunk["prompts"])
    for (trajectory, _), attempt in zip(shown, chunk["attempts"], strict=True):
        turns = attempt["turns"]
        text = "".join("".join(t["text"]) + (t["said"] or "") for t in turns)
        ids = (*trajectory.prompt.token_ids, *trajectory.response_ids)
        assert prompts[attempt["group"]]["prompt"] + text == tokenizer.decode(
            ids
        )  # nothing lost, nothing twice, in order
        for turn, told in zip(trajectory.turns, turns, strict=True):
            assert told["ids"] == list(turn.token_ids)
            assert told["logprobs"] == [round(x, 4) for x in turn.logprobs]
            assert len(told["text"]) == len(turn.token_ids) - sum(n - 1 for _, n in told["counts"])
            assert told["versions"] == [[STEP, len(turn.token_ids)]]
            assert told["num_said"] == len(turn.observation_ids)
    columns = index["columns"]
    assert columns["correct"] == [int(r.correct) for _, r in shown]
    assert 0 < sum(columns["correct"]) < len(shown)
    assert columns["sampled"] == [sum(t.loss_mask) for t, _ in shown]
    assert columns["calls"] == [len(t.tool_calls) for t, _ in shown]
    assert [index["answers"][i] if i >= 0 else None for i in columns["answer"]] == [r.extracted for _, r in shown]
    assert [p[0] for p in index["problems"]] == [g.prompt.problem.problem_id for g in groups]
    assert columns["group"] == [n for n, g in enumerate(groups) for _ in g.trajectories]


def test_limit_step_and_json(tmp_path: Path, groups: tuple[Group, ...], capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, groups, step=0)
    _write(tmp_path, groups[:1], step=7)
    assert view(tmp_path, (), Options(step=0, limit=4, out=tmp_path / "x", as_json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"html": str(tmp_path / "x/index.html"), "step": 0, "shown": 4, "recorded": 18, "faults": 0}
    data = _data(tmp_path / "x")
    assert len(data["run/step_00000.000"]["attempts"]) == 4
    assert data["manifest"]["open"] == "step_00000"
    assert "run/step_00007.index" not in data
    view(tmp_path, (), Options(as_json=True))
    assert json.loads(capsys.readouterr().out)["step"] == 7  # the last one
    with pytest.raises(DataError, match=r"this run has steps 0 to 7"):
        view(tmp_path, (), Options(step=5))
    with pytest.raises(DataError, match=r"give a run folder"):
        view(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"is named twice"):
        view(tmp_path, [tmp_path / "x" / ".."])


def test_chunks_are_small_and_found_again(tmp_path: Path, groups: tuple[Group, ...]) -> None:
    many = tuple(groups[i % 3] for i in range(60))  # 360 attempts
    _write(tmp_path, many)
    view(tmp_path)
    data = _data(tmp_path / "view")
    starts = data["run/step_00003.index"]["starts"]
    sizes = [len(data[f"run/step_00003.{n:03d}"]["attempts"]) for n in range(len(starts))]
    assert starts == [sum(sizes[:n]) for n in range(len(sizes))]
    assert sum(sizes) == 360
    assert max(sizes) == 128


def test_what_has_not_changed_is_not_written_again(tmp_path: Path, groups: tuple[Group, ...]) -> None:
    for step in (0, 1):
        _write(tmp_path, groups, step=step)
    view(tmp_path)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "view").rglob("*") if p.is_file()}
    view(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert not list((tmp_path / "view").rglob("*.tmp"))
    _write(tmp_path, tuple(groups[:1]) * 60, step=1)
    view(tmp_path)
    changed = {p.name for p, before in written.items() if p.stat().st_mtime_ns != before}
    assert changed == {"step_00001.index.js", "step_00001.000.js", "written.json", "manifest.js"}
    versions = [{s["name"]: s["version"] for s in _data(tmp_path / "view")["manifest"]["runs"][0]["sets"]}]
    _write(tmp_path, groups, step=1)
    view(tmp_path)
    assert not (tmp_path / "view/data/run/step_00001.001.js").exists()  # of the longer file
    versions.append({s["name"]: s["version"] for s in _data(tmp_path / "view")["manifest"]["runs"][0]["sets"]})
    assert versions[0]["step_00000"] == versions[1]["step_00000"]
    assert versions[0]["step_00001"] != versions[1]["step_00001"]


def test_damage_is_counted_and_named(tmp_path: Path, groups: tuple[Group, ...]) -> None:
    path = _write(tmp_path, groups, step=0)
    lines = [json.dumps(row) for row in read_rows(path)]
    lines[2], lines[5], lines[7] = lines[2][:100], json.dumps({"step": 0}), "[1]"
    path.write_bytes(zstandard.ZstdCompressor().compress(("\n".join(lines) + "\n").encode()))
    cut = _write(tmp_path, tuple(groups) * 40, step=1)
    cut.write_bytes(cut.read_bytes()[:-40])
    _write(tmp_path, groups, step=2).write_bytes(b"nothing of the kind")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/step_00000.jsonl").write_text('{"problem_id": "a"}\n{"problem')
    assert view(tmp_path) == 0
    data = _data(tmp_path / "view")
    sets = {s["name"]: s for s in data["manifest"]["runs"][0]["sets"]}
    assert (sets["step_00000"]["attempts"], sets["step_00000"]["faults"]) == (15, 3)
    named = data["run/step_00000.index"]["faults"]
    assert [fault.split(": ")[0] for fault in named] == [f"{path}:{n}" for n in (3, 6, 8)]
    assert 0 < sets["step_00001"]["attempts"] < 720
    assert sets["step_00001"]["first_fault"].endswith("ends early: it was cut off, or is still being written")
    assert (sets["step_00002"]["attempts"], sets["step_00002"]["faults"]) == (0, 1)
    assert sets["eval_step_00000"]["faults"] == 2


def test_a_run_that_only_evaluated_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval").mkdir()
    row = {"problem_id": "aime/1", "source": "aime", "problem": "1+1", "gold": "2", "extracted": "2", "correct": True,
           "grader": "ok", "stop_reason": "eos", "num_tokens": 9, "response": "```python\nprint(2)\n```\n```output\n2\n```\nso 2",
           "tool_calls": [{"status": "ok", "code": "print(2)\n", "observation": "\n2\n```\n"}]}  # fmt: skip
    lines = [json.dumps(row | {"sample": i}) for i in range(3)] + [
        json.dumps(row | {"problem_id": "aime/2", "sample": 0})
    ]
    (tmp_path / "eval/a b.jsonl").write_text("\n".join(lines) + "\n")
    assert view(tmp_path, (), Options(as_json=True)) == 0
    assert json.loads(capsys.readouterr().out)["shown"] == 4
    data = _data(tmp_path / "view")
    name = data["manifest"]["open"]
    assert re.fullmatch(r"eval_a_b_[0-9a-f]{8}", name)  # a name that any address can hold
    assert data[f"run/{name}.index"]["columns"]["group"] == [0, 0, 0, 1]
    turns = data[f"run/{name}.000"]["attempts"][0]["turns"]
    assert [t["text"] for t in turns] == [["```python\nprint(2)\n```\n```output"], ["so 2"]]
    assert turns[0]["said"] == "\n2\n```\n"
    with pytest.raises(DataError, match=r"hold no tokens"):
        view(tmp_path, audit=rules_of)
    with pytest.raises(DataError, match=r"has recorded no step"):
        view(tmp_path, (), Options(step=0))


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)></pre></style><!-- ]]> {{ 7*7 }} &lt;b&gt; \"'` "
    "\x1b[31mred\x1b]0;title\x07 \x00nul \u202egnp.exe \u200b\ufeff zero \r\n\x85 \x7f \ud800 ' onmouseover='alert(1)"
)


def hostile_run(folder: Path, groups: tuple[Group, ...]) -> Path:
    group = groups[0]
    problem = dataclasses.replace(group.prompt.problem, problem=HOSTILE, answer=HOSTILE, problem_id=HOSTILE)
    prompt = dataclasses.replace(group.prompt, problem=problem)
    call = ToolCall(HOSTILE, ExecutionStatus.OK, 0, HOSTILE, 0.1)
    turns = (Turn((1,), (-1.0,), (0,), HOSTILE, call, (2,)), Turn((3,), (-1.0,), (0,), HOSTILE))
    trajectory = dataclasses.replace(group.trajectories[0], prompt=prompt, turns=turns)
    reward = dataclasses.replace(group.rewards[0], extracted=HOSTILE, parts={HOSTILE: 1.0, "__proto__": 2.0})
    _write(folder, (Group(prompt, (trajectory,), (reward,)),))
    (folder / "config.json").unlink()  # no tokenizer: the recorded text itself is shown
    return folder


@pytest.mark.parametrize("out", ["view", "page.html"])
def test_hostile_text_is_no_part_of_page_or_script(tmp_path: Path, groups: tuple[Group, ...], out: str) -> None:
    """Text of problem, model, program and grader stands in files as base64 alone, and without what acts on a reader."""
    hostile_run(tmp_path, groups)
    assert view(tmp_path, (), Options(out=tmp_path / out)) == 0
    for path in [tmp_path / out] if out.endswith("html") else (tmp_path / out).rglob("*.*"):
        assert "alert(1)" not in path.read_text("utf-8")
    if not out.endswith("html"):
        told = json.dumps(_data(tmp_path / out), ensure_ascii=False)
        assert told.count("alert(1)") > 10
        assert not re.search(
            "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", told
        )
        assert "Shown by turn instead of by token" in told


def test_the_policy_allows_the_pages_own_files_and_nothing_else(tmp_path: Path, groups: tuple[Group, ...]) -> None:
    _write(tmp_path, groups)
    view(tmp_path)
    raw = (tmp_path / "view/index.html").read_text()
    assert "\"default-src 'none'; script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'\"" in raw
    assert not re.search(r"https?://|@import|url\(|<script>|<style>| on[a-z]+=", raw)
    view(tmp_path, (), Options(out=tmp_path / "page.html"))
    raw = (tmp_path / "page.html").read_text()
    scripts, styles = re.findall(r"<script>(.*?)</script>", raw, re.S), re.findall(r"<style>(.*?)</style>", raw, re.S)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (*scripts, *styles)]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', raw)
    assert policy is not None
    assert re.findall(r"'sha256-([^']+)'", policy[1]) == hashes
    assert "unsafe" not in policy[1]
    assert "self" not in policy[1]


def test_no_file_of_the_program_makes_markup_of_text() -> None:
    for path in sorted((ROOT / "torl_mega/view/app").glob("*.js")):
        text = path.read_text()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "fetch(",
            "XMLHttp",
        ):
            assert word not in text, f"{path.name}: {word}"
        assert len(text.splitlines()) < 450, path.name


def test_tokens_that_share_a_character_are_one_piece(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é漢🎉x")
    pieces = Pieces(tokenizer.decode)
    texts, counts = pieces.of(ids)
    assert texts == ["é", "漢", "🎉", "x"]
    assert sum(count - 1 for _, count in counts) + 4 == len(ids)
    assert pieces.of(ids) == (texts, counts)  # also from what was decoded before
    broken = [tokenizer.encode("漢")[0]] * 20  # bytes that never make a character
    assert pieces.of(broken)[1] == [[0, 8], [1, 8], [2, 4]]


# ------------------------------------------------------------------------------------------------ audit


def test_the_audit_passes_what_was_really_sampled(
    tmp_path: Path, groups: tuple[Group, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, groups, step=STEP)
    _write(tmp_path, groups, step=STEP + 1)
    assert view(tmp_path, (), Options(as_json=True), audit=rules_of) == 0
    said = json.loads(capsys.readouterr().out)
    masks = [m for g in groups for t in g.trajectories for m in t.loss_mask]
    assert said == {
        "num_files": 2,
        "num_trajectories": 36,
        "num_sampled": 2 * sum(masks),
        "num_inserted": 2 * (len(masks) - sum(masks)),
        "violation": None,
    }
    assert said["num_inserted"] > 0


def _call_turn(row: Row) -> Row:
    return next(t for t in row["turns"] if t["tool_call"])


def _set(path: str, value: Any) -> Callable[[Row], None]:
    """Damages one place of the turn that called the tool (`turn.…`) or of the row."""

    def damage(row: Row) -> None:
        *parents, last = path.split(".")
        place: Any = row
        for name in parents:
            place = _call_turn(row) if name == "turn" else place[int(name) if name.isdigit() else name]
        place[int(last) if last.isdigit() else last] = value(place[int(last) if last.isdigit() else last])

    return damage


DAMAGE = {
    "another sampled id": (_set("turn.token_ids.2", lambda i: (i + 1) % 256), "turns[0].text"),
    "another text": (_set("turn.text", lambda s: s.replace("python", "Python")), "turns[0].text"),
    "a logprob is missing": (_set("turn.logprobs", lambda x: x[:-1]), "turns[0].logprobs"),
    "a logprob is positive": (_set("turn.logprobs.4", lambda _: 1e-3), "turns[0].logprobs[4]"),
    "a logprob is not finite": (_set("turn.logprobs.4", lambda _: math.nan), "turns[0].logprobs[4]"),
    "a version is missing": (_set("turn.policy_versions", lambda x: x[1:]), "turns[0].policy_versions"),
    "a version of the future": (_set("turn.policy_versions.0", lambda _: STEP + 1), "turns[0].policy_versions[0]"),
    "an inserted version": (_set("turn.policy_versions.0", lambda _: -1), "turns[0].policy_versions[0]"),
    "another observation id": (_set("turn.observation_ids.0", lambda i: i + 1), "turns[0].observation_ids"),
    "another observation": (_set("turn.tool_call.observation", lambda s: s + " "), "turns[0].observation_ids"),
    "no observation, but on it goes": (_set("turn.observation_ids", lambda _: []), "turns[0].observation_ids"),
    "inserted without a call": (_set("turn.tool_call", lambda _: None), "turns[0].observation_ids"),
    "an unknown status": (_set("turn.tool_call.status", lambda _: "fine"), "row"),
    "the prompt is cut": (_set("prompt_ids", lambda _: []), "prompt_ids"),
    "the prompt was encoded otherwise": (_set("prompt_ids", lambda x: [48, *x[1:], 300, 290]), "prompt_ids"),
    "an end that was not": (_set("turns", lambda t: [{**t[-1], "token_ids": t[-1]["token_ids"][:-1],
        "logprobs": t[-1]["logprobs"][:-1], "policy_versions": t[-1]["policy_versions"][:-1],
        "text": t[-1]["text"].removesuffix("<|endoftext|>")}]), "stop_reason"),
    "no turn": (_set("turns", lambda _: []), "turns"),
    "a reward that its parts do not make": (_set("reward.value", lambda v: v + 0.5), "reward.value"),
    "an advantage that is not a number": (_set("advantage", lambda _: math.inf), "advantage"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_the_audit_names_the_first_damage(
    name: str, tmp_path: Path, groups: tuple[Group, ...], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, field = DAMAGE[name]
    path = _write(tmp_path, groups)
    rows = list(read_rows(path))
    line = next(
        n for n, row in enumerate(rows) if any(t["tool_call"] for t in row["turns"]) and row["stop_reason"] == "eos"
    )
    assert audit_row(copy.deepcopy(rows[line]), Rules(tokenizer))[1] is None
    damage(rows[line])
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    assert view(tmp_path, audit=rules_of) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"audit failed: {path}:{line + 1}: {field}"), said
    assert said.count("\n") == 1


def test_the_audit_reports_a_damaged_file(tmp_path: Path, groups: tuple[Group, ...], tokenizer: Tokenizer) -> None:
    path = _write(tmp_path, groups)
    whole = path.read_bytes()
    for broken in (b"", b"not zstd", whole[: len(whole) // 2], zstandard.ZstdCompressor().compress(b'{"step": 1\n')):
        path.write_bytes(broken)
        assert audit_files([path], Rules(tokenizer)).violation is not None


def test_a_token_may_run_past_the_stop_string_and_no_further(groups: tuple[Group, ...], tokenizer: Tokenizer) -> None:
    """SGLang stops on text: the last token can hold more than the stop string, its ids stay as sampled."""
    row = _row_with_call(groups)
    turn, tail = _call_turn(row), tokenizer.encode("`")[0]
    turn["token_ids"], turn["text"] = list(tokenizer.encode("x\n```output")), "x\n```output"
    for name, value in (("logprobs", -1.0), ("policy_versions", STEP)):
        turn[name] = [value] * len(turn["token_ids"])
    assert audit_row(row, Rules(tokenizer))[1] is None
    for name, value in (("token_ids", tail), ("logprobs", -1.0), ("policy_versions", STEP)):
        turn[name].append(value)
    assert (audit_row(row, Rules(tokenizer))[1] or ("",))[0] == "turns[0].text"


def _row_with_call(groups: tuple[Group, ...]) -> Row:
    pairs = [(t, r) for g in groups for t, r in zip(g.trajectories, g.rewards, strict=True) if t.tool_calls]
    return json.loads(json.dumps(to_row(STEP, Recorded(0, *pairs[0], 0.0))))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_step_that_was_cut_off_is_said_so(tmp_path: Path, groups: tuple[Group, ...], share: float) -> None:
    path = write_step(tmp_path / "trajectories", 0, groups, [0.0] * sum(len(g.trajectories) for g in groups))
    whole = path.read_bytes()
    assert len(list(read_rows(path))) == sum(len(g.trajectories) for g in groups)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match="ends early"):
        list(read_rows(path))
    path.write_bytes(whole + whole)  # frames one after the other, as `cat` makes them
    assert len(list(read_rows(path))) == 2 * sum(len(g.trajectories) for g in groups)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, groups: tuple[Group, ...]) -> None:
    run = tmp_path / "run"
    _write(run, groups)
    with pytest.raises(DataError, match=r"page cannot be written: "):
        view(run, (), Options(out=run / "config.json" / "page"))
    with pytest.raises(DataError, match=r"page.html cannot be written: "):
        view(run, (), Options(out=run / "config.json" / "page.html"))
