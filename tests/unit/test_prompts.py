"""Data sets into prompts: templates byte for byte, formats, cursor and epochs, and every complaint names file and row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torl_mega.config import DataConfig
from torl_mega.data.problem_files import load_problems, open_problems
from torl_mega.data.prompts import PromptSource, encode_prompts, plain_prompts, render_template
from torl_mega.errors import DataError
from torl_mega.types import Problem

TORL_TEST = Path(__file__).resolve().parents[3] / "shared/data/torl_test.parquet"


def encode(text: str) -> list[int]:
    return list(text.encode())


def config(path: Path | str, **changes) -> DataConfig:
    settings = {"train": str(path), "template": "{problem}", "max_prompt_tokens": 400, **changes}
    return DataConfig.model_validate(settings)


def source_of(data: DataConfig, *, seed: int) -> PromptSource:
    return PromptSource(data, plain_prompts(data.template, encode), seed=seed)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "n.jsonl", [{"problem": f"p{i}", "answer": str(i)} for i in range(10)])


@pytest.mark.parametrize("name", ["torl", "torl_paper"])
def test_the_templates_have_the_paper_bytes(name: str) -> None:
    text = render_template(name, Problem("s/0", "What is {x}?", "1", "s"))
    paper = (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
        "User: Please integrate natural language reasoning with programs to solve the problem above, and put your final "
        "answer within \\boxed{}.\nWhat is {x}?\nAssistant:"
    )
    assert text == paper + ("\n" if name == "torl" else "")


def test_a_custom_template_keeps_its_other_braces_and_must_name_the_problem() -> None:
    problem = Problem("s/0", "1+1", "2", "s")
    assert render_template("Q: {problem}, in \\boxed{}: ", problem) == "Q: 1+1, in \\boxed{}: "
    with pytest.raises(DataError, match=r"no \{problem\} in it"):
        render_template("Q: {question}", problem)


@pytest.mark.skipif(not TORL_TEST.exists(), reason="needs the released test file")
def test_the_released_test_file_reads_as_bare_problems() -> None:
    problems = load_problems(str(TORL_TEST))
    assert Counter(p.source for p in problems) == {"math500": 134, "aime24": 120, "aime25": 120}
    assert problems[0].answer == "204"
    assert problems[0].problem.startswith("Every morning Aya goes")
    assert len({p.problem_id for p in problems}) == 374
    source = source_of(config(TORL_TEST, template="torl", overlong_prompts="drop"), seed=0)
    assert source.num_dropped + source.num_problems == 374


def test_a_row_that_carries_the_prompt_already_gives_the_bare_problem_back(tmp_path: Path) -> None:
    bare = Problem("s/0", "What is $1+1$?", "2", "s")
    rows = [
        {
            "data_source": "s",
            "prompt": [{"role": "user", "content": render_template(name, bare)}],
            "reward_model": {"ground_truth": "2"},
        }
        for name in ("torl", "torl_paper")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [p.problem for p in load_problems(str(tmp_path / "x.parquet"))] == [bare.problem] * 2


def verl(ground_truth: str) -> dict:
    prompt = [{"role": "user", "content": "p"}]
    return {"data_source": "m", "prompt": prompt, "reward_model": {"ground_truth": ground_truth}}


@pytest.mark.parametrize(
    ("row", "answer", "source"),
    [
        ({"problem": "p", "answer": 27.0}, "27", "amc23"),
        ({"ID": "x", "Problem": "p", "Answer": 33, "Solution": "s"}, "33", "amc23"),
        ({"question": "p", "final_answer": ["$2$"], "subfield": "Algebra"}, "$2$", "amc23"),
        ({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}.", "level": "Level 1"}, "\\frac{1}{2}", "amc23"),
        ({"problem": "p", "answer": "5", "source": "cn_k12", "solution": "s"}, "5", "cn_k12"),
        ({"problem": "p", "answer": "$\\boxed{35}$"}, "35", "amc23"),
        ({"question": "p", "answer": "So 5*7 = \\boxed{35}.", "gt_answer": "35"}, "35", "amc23"),  # simpleRL
        ({"question": "p", "answer": "Half of 1,446 is 723.\n#### 723"}, "723", "amc23"),  # GSM8K
        ({"prompt": "p", "answer": "[1,2]"}, "[1,2]", "amc23"),  # an interval, not a list of one
        (
            {"prompt": "p", "solution": "s", "data_source": "m", "reward_model": {"ground_truth": "35"}},
            "35",
            "m",
        ),  # DAPO
        (verl('["1,234"]'), "1,234", "m"),  # Skywork-OR1 writes a JSON list of one
        (verl('["35\\\\%"]'), "35\\%", "m"),
        (verl('["\\\\frac{1}{2}"]'), "\\frac{1}{2}", "m"),
        (verl('["\\frac{1}{2}"]'), "\\frac{1}{2}", "m"),  # without escaping: `\\f` is no form feed
        (verl('["\\sqrt{2}"]'), "\\sqrt{2}", "m"),
        (verl('["a", "b"]'), '["a", "b"]', "m"),
        (verl("\\boxed{(1,2)}"), "(1,2)", "m"),
    ],
)
def test_public_formats(tmp_path: Path, row: dict, answer: str, source: str) -> None:
    (tmp_path / "amc23").mkdir()
    [problem] = load_problems(str(write_jsonl(tmp_path / "amc23" / "test.jsonl", [row])))
    assert (problem.answer, problem.source, problem.problem) == (answer, source, "p")


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_neither_skip_nor_repeat_and_the_cursor_goes_on_exactly(numbers: Path, shuffle: bool) -> None:
    source = source_of(config(numbers, shuffle=shuffle), seed=3)
    drawn, states = [], []
    for n in (4, 7, 9, 1, 9):  # 30 prompts: three epochs, their ends in the middle of a call
        states.append(json.loads(json.dumps(source.state())))
        drawn += [p.problem.answer for p in source.next(n)]
    epochs = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(e) == [str(i) for i in range(10)] for e in epochs)
    assert (epochs[0] != epochs[1]) is shuffle
    for at, state in zip((0, 4, 11, 20, 21), states, strict=True):
        fresh = source_of(config(numbers, shuffle=shuffle), seed=3)
        fresh.restore(state)
        assert [p.problem.answer for p in fresh.next(30 - at)] == drawn[at:]


def test_another_seed_gives_another_order(numbers: Path) -> None:
    orders = [[p.problem.answer for p in source_of(config(numbers), seed=s).next(10)] for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_prompts_that_were_put_back_come_first_and_survive_a_restore(numbers: Path) -> None:
    source = source_of(config(numbers), seed=3)
    first = source.next(4)
    source.put_back(first[1:3])
    state = json.loads(json.dumps(source.state()))
    fresh = source_of(config(numbers), seed=3)
    fresh.restore(state)
    for again in (source, fresh):
        assert again.next(3) == [*first[1:3], *source_of(config(numbers), seed=3).next(5)[4:]]


def test_a_cursor_of_other_data_or_another_seed_is_refused(numbers: Path, tmp_path: Path) -> None:
    state = source_of(config(numbers), seed=3).state()
    other = write_jsonl(tmp_path / "o.jsonl", [{"problem": f"q{i}", "answer": str(i)} for i in range(10)])
    for path, seed in ((other, 3), (numbers, 4)):
        with pytest.raises(DataError, match="other training data or another seed"):
            source_of(config(path), seed=seed).restore(state)


def test_the_generated_task_goes_on_after_a_restore() -> None:
    source = source_of(config("arithmetic:7"), seed=0)
    source.next(5)
    state = source.state()
    expected = source.next(5)
    fresh = source_of(config("arithmetic:7"), seed=0)
    fresh.restore(state)
    assert fresh.next(5) == expected
    assert len(load_problems("arithmetic:7", max_problems=3)) == 3


def test_parquet_rows_come_from_any_row_group(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"problem": f"p{i}", "answer": str(i)} for i in range(100)])
    pq.write_table(table, tmp_path / "g.parquet", row_group_size=3)
    file = open_problems(str(tmp_path / "g.parquet"))
    assert [file[i].answer for i in (99, 0, 50, 2, 3)] == ["99", "0", "50", "2", "3"]
    drawn = [p.problem.answer for p in source_of(config(tmp_path / "g.parquet"), seed=0).next(100)]
    assert sorted(drawn, key=int) == [str(i) for i in range(100)]


def test_overlong_prompts_stop_or_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "n.jsonl", [{"problem": "p" * n, "answer": "1"} for n in (3, 30, 4, 40)])
    with pytest.raises(DataError, match=r"n/1.* 30 tokens, data.max_prompt_tokens is 10"):
        source_of(config(path, max_prompt_tokens=10), seed=0)
    source = source_of(config(path, max_prompt_tokens=10, overlong_prompts="drop"), seed=0)
    assert (source.num_dropped, source.num_problems) == (2, 2)
    assert {len(p.token_ids) for p in source.next(8)} == {3, 4}
    with pytest.raises(DataError, match="none of its 4 prompts fits"):
        source_of(config(path, max_prompt_tokens=2, overlong_prompts="drop"), seed=0)
    problems = load_problems(str(path))
    assert len(encode_prompts(problems, plain_prompts("{problem}", encode), max_prompt_tokens=10, overlong="drop")) == 2


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.jsonl", ['{"problem": "p", "answer": "1"}', "{broken"], r"a\.jsonl:2: not JSON"),
        ("a.jsonl", ['{"problem": "p", "answer": "1"}', "[1]"], r"a\.jsonl:2: expected a JSON object, found list"),
        ("a.jsonl", ['{"problem": "p"}'], r"a\.jsonl:1: no answer"),
        ("a.jsonl", ['{"text": "p", "answer": "1"}'], r"a\.jsonl:1: no problem text; .* found text, answer"),
        ("a.jsonl", ['{"problem": "  ", "answer": "1"}'], r"a\.jsonl:1: no problem text"),
        (
            "a.jsonl",
            ['{"prompt": [{"role": "system", "content": "x"}], "reward_model": {"ground_truth": "1"}}'],
            "role user",
        ),
        ("a.jsonl", ['{"prompt": [{"role": "user", "content": "x"}], "reward_model": {}}'], "ground_truth is missing"),
        ("a.jsonl", ['{"problem": "p", "answer": NaN}'], r"a\.jsonl:1: no answer"),  # how pandas writes a missing one
        ("a.jsonl", ['{"problem": NaN, "answer": "1"}'], r"a\.jsonl:1: no problem text"),
        ("a.jsonl", ['{"problem": "p", "answer": "\\\\boxed{}"}'], r"a\.jsonl:1: no answer"),
        ("a.jsonl", [], "no problems in it"),
        ("a.parquet", ["not parquet"], "not readable as parquet"),
        ("a.csv", ["p,1"], "'.csv' is not a known data format"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    path = write_jsonl(tmp_path / name, lines)
    with pytest.raises(DataError, match=message):
        load_problems(str(path))
    with pytest.raises(DataError, match=message):
        source_of(config(path), seed=0)


def test_a_missing_file_a_bad_seed_and_an_endless_set_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        load_problems(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match="expected arithmetic:SEED"):
        load_problems("arithmetic:x", max_problems=1)
    with pytest.raises(DataError, match="never ends"):
        load_problems("arithmetic:1")


def test_another_number_of_problems_than_the_papers_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "torl_train.jsonl", [{"problem": "p", "answer": "1"}])
    source_of(config(path), seed=0)
    assert "has 1 problems; the paper trains on 28740" in caplog.text
