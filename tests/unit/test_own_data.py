"""Data of the user's: columns by name, a reader of their own, several files by weight, and golds that the grader must read."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from torl_mega.config import ColumnsConfig, DataConfig
from torl_mega.data.golds import judge_golds, read_golds
from torl_mega.data.problem_files import load_problems, open_problems
from torl_mega.data.prompts import TEMPLATES, PromptSource
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, DataError
from torl_mega.reward.answers.check import is_readable

MODULE = """
from torl_mega.types import Problem

def read(path):
    for n in range(3):
        yield {"problem": f"{path} {n}", "answer": n, "level": n * 2}

def ready():
    return [Problem("mine/0", "1+1", "2", "mine", {"kept": True})]

def broken():
    yield {"problem": "1+1", "answer": "2"}
    raise OSError("the server is gone")

def strange():
    yield "a text"
"""
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\nWhat is 1+1?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def file(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def config(train: Any, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"train": train, "template": "{problem}", "max_prompt_tokens": 999, **settings})


def source(train: Any, **settings: Any) -> PromptSource:
    return PromptSource(config(train, **settings), lambda problem: problem.problem.encode(), seed=1)


def texts(prompts: Any) -> list[str]:
    return [prompt.problem.problem for prompt in prompts]


def test_columns_are_taken_by_name_and_kept(tmp_path: Path) -> None:
    row = {"q": "1+1", "meta": {"gold": 2, "level": 3}, "problem": "not this", "answer": "nor this", "when": "today"}
    path = file(tmp_path, "a.jsonl", [row])
    columns = ColumnsConfig(problem="q", answer="meta.gold", extra=("when", "meta.level"))
    (problem,) = open_problems(path, columns)
    assert (problem.problem, problem.answer) == ("1+1", "2")
    assert problem.extra == {"when": "today", "meta.level": 3}
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'meta\.golden' \(data\.columns\); found q, meta"):
        open_problems(path, ColumnsConfig(answer="meta.golden"))


def test_a_column_of_messages_gives_its_last_user_text(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1"}]
    path = file(tmp_path, "a.jsonl", [{"chat": messages, "gold": "2", "reward_model": {"ground_truth": "9"}}])
    (problem,) = open_problems(path, ColumnsConfig(problem="chat", answer="gold"))
    assert (problem.problem, problem.answer) == ("1+1", "2")


@pytest.mark.parametrize(
    ("row", "problem", "answer"),
    [
        ({"prompt": [{"role": "user", "content": "1+1"}], "label": "2"}, "1+1", "2"),
        ({"prompt": "1+1", "label": 2}, "1+1", "2"),
        ({"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "2"}}, "What is 1+1?", "2"),
        ({"question": "1+1", "answer": "It is two.\n#### 2"}, "1+1", "2"),
        ({"question": "1+1", "answer": "It is two.\n####2"}, "1+1", "2"),
        ({"question": "1+1", "answer": "#### 1,446"}, "1+1", "1,446"),
    ],
)
def test_known_layouts_of_other_trainers(tmp_path: Path, row: dict[str, Any], problem: str, answer: str) -> None:
    (found,) = open_problems(file(tmp_path, "a.jsonl", [row]))
    assert (found.problem, found.answer) == (problem, answer)


def test_a_reader_of_the_users(tmp_path: Path) -> None:
    prompts = source("some/name", source="their_data:read", columns={"extra": ["level"]}, shuffle=False).next(3)
    assert texts(prompts) == ["some/name 0", "some/name 1", "some/name 2"]
    assert [prompt.problem.extra["level"] for prompt in prompts] == [0, 2, 4]
    (ready,) = source("their_data:ready").next(1)
    assert ready.problem.extra == {"kept": True}
    assert load_problems("their_data:ready") == [ready.problem]


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ("their_data:broken", "data.train = their_data:broken: row 0: OSError: the server is gone"),
        ("their_data:strange", "row 0 is no mapping and no Problem but str"),
        ("their_data:nothing", "their_data has no nothing"),
        ("no_such_data:rows", "put the folder that holds it on PYTHONPATH"),
    ],
)
def test_a_reader_that_fails_is_one_line(train: str, problem: str) -> None:
    with pytest.raises((DataError, ConfigError)) as caught:
        source(train)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_files_by_weight_and_again_from_the_cursor(tmp_path: Path) -> None:
    few = file(tmp_path, "few.jsonl", [{"problem": f"few {n}", "answer": n} for n in range(3)])
    many = file(tmp_path, "many.jsonl", [{"problem": f"many {n}", "answer": n} for n in range(50)])
    mix = [{"path": few, "weight": 1}, {"path": many, "weight": 2.5}, {"path": "arithmetic:1", "weight": 0.5}]

    drawn = source(mix).next(40)
    counts = Counter(prompt.problem.source for prompt in drawn)
    assert counts == {"few": 10, "many": 25, "arithmetic": 5}
    for n in range(1, 41):  # in every prefix too
        for name, share in (("few", 0.25), ("many", 0.625), ("arithmetic", 0.125)):
            assert abs(sum(p.problem.source == name for p in drawn[:n]) - share * n) < 1

    first = source(mix)
    first.next(17)
    second = source(mix)
    second.restore(json.loads(json.dumps(first.state())))
    assert texts(second.next(23)) == texts(drawn[17:])
    with pytest.raises(DataError, match="restore data"):
        source([mix[0], {**mix[1], "weight": 2}, mix[2]]).restore(first.state())


def test_problems_of_files_with_the_same_names_are_different_problems(tmp_path: Path) -> None:
    """Files of Hugging Face are all called train-00000-of-00001; a mastered problem retires none of another file."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    rows = [{"problem": text, "answer": "1", "source": "math"} for text in ("one", "two", "three", "four")]
    mix = [
        {"path": file(tmp_path / name, "train.jsonl", part), "weight": 1}
        for name, part in (("a", rows[:2]), ("b", rows[2:]))
    ]
    prompts = source(mix)
    drawn = {prompt.problem.problem: prompt.problem.problem_id for prompt in prompts.next(4)}
    assert len(set(drawn.values())) == 4
    prompts.retire([drawn["one"]])
    assert set(texts(prompts.next(8))) == {"two", "three", "four"}


@pytest.mark.parametrize(
    ("path", "source_name"),
    [
        ("aime/train-00000-of-00002.parquet", "aime"), ("aime/data/test-00001-of-00002.parquet", "aime"),
        ("data/test.parquet", "here"), ("amc.jsonl", "amc"), ("x/trains.jsonl", "trains"),
    ],
)  # fmt: skip
def test_a_file_without_a_name_of_its_own_is_called_after_its_folder(
    path: str, source_name: str, tmp_path: Path
) -> None:
    from torl_mega.data.readers import _default_source

    assert _default_source(tmp_path / "here" / path) == source_name


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for settings, problem in (
        ({"train": []}, "nothing to train on"),
        ({"train": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"train": "a", "source": "read.py"}, "pkg.module:name"),
    ):
        with pytest.raises(ValidationError, match=problem):
            DataConfig.model_validate({"template": "{problem}", "max_prompt_tokens": 9, **settings})


def test_a_template_with_a_special_token_is_refused() -> None:
    tokenizer = Tokenizer(Path(__file__).parents[2] / "conf/quickstart")
    tokenizer.check_plain(TEMPLATES["torl"], "data.template")
    with pytest.raises(DataError, match=r"data\.template holds '<\|im_start\|>', a special token"):
        tokenizer.check_plain("<|im_start|>user\n{problem}", "data.template")


def test_golds_that_the_grader_cannot_read_are_named_and_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prose = "The proof follows by induction on the number of vertices of the graph, see above"
    answers = [str(n) for n in range(96)] + ["\\frac{1}{2}", "x+1", "(1,2)", prose]
    path = file(tmp_path, "a.jsonl", [{"problem": "p", "answer": a} for a in answers])

    async def readable(gold: str) -> bool:
        return is_readable(gold)

    golds = asyncio.run(read_golds(open_problems(path), readable))
    assert (golds.num_asked, len(golds.unreadable)) == (100, 1)
    judge_golds(path, golds, most=0.05)
    assert "1 of 100 gold answers (1.0%) cannot be read by the grader: a/99 ('The proof" in caplog.text
    with pytest.raises(DataError, match=r"a\.jsonl: 1 of 100 .*a/99.*data\.max_unreadable_golds = 0\.005"):
        judge_golds(path, golds, most=0.005)
