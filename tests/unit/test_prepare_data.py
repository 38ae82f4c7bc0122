"""The data tool on made-up inputs of each format: counts, contamination, broken rows, resuming, selection."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torl_mega.data.cleaning import Benchmarks, fingerprint, limr_scores
from torl_mega.data.problem_files import load_problems, open_problems
from torl_mega.reward.answers.check import is_readable
from torl_mega.types import Problem

TOOL = Path(__file__).resolve().parents[2] / "tools/prepare_data.py"
LEAK = "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards with her friends"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = module
    spec.loader.exec_module(module)
    return module


def jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    numina = [
        {"problem": "Add 1 and 2.", "answer": "3", "source": "cn_k12", "problem_type": "Algebra", "question_type": "MCQ"},
        {"problem": "Prove that 2 is even.", "answer": "proof", "source": "olympiads", "question_type": "proof"},
        {"problem": "Is it so?", "answer": "it depends on how one reads the question at hand", "source": "olympiads"},
        "{broken",
        {"problem": "ADD $1$ and 2", "answer": "3", "source": "again"},
        {"problem": "add 1 and 2", "answer": "4", "source": "conflict"},
    ]  # fmt: skip
    math = [
        {
            "problem": "What is half of one?",
            "solution": "It is $\\boxed{\\frac{1}{2}}$.",
            "level": "Level 1",
            "type": "Prealgebra",
        },
        {"problem": "No answer here", "solution": "none", "level": "Level 1"},
    ]
    deepscaler = [
        {"problem": "How many?", "answer": "(2, \\infty)", "solution": ""},
        {"problem": LEAK + ", how long?", "answer": "204", "solution": ""},
    ]
    verl = {
        "data_source": "torl",
        "prompt": [{"role": "user", "content": "The very leaked one"}],
        "reward_model": {"ground_truth": "7"},
        "extra_info": {"id": "x"},
    }
    other = {
        **verl,
        "prompt": [{"role": "user", "content": "Three times four?"}],
        "reward_model": {"ground_truth": "12"},
    }
    pq.write_table(pa.Table.from_pylist([verl, other]), tmp_path / "verl.parquet")
    table = pa.Table.from_pylist([{"problem": "Saved to disk: 5+6?", "answer": "11", "source": "disk"}])
    (tmp_path / "hf").mkdir()
    with (
        pa.OSFile(str(tmp_path / "hf/data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (tmp_path / "hf/dataset_info.json").write_text("{}")
    (tmp_path / "ds.json").write_text(json.dumps(deepscaler))
    return [
        jsonl(tmp_path / "numina.jsonl", numina),
        jsonl(tmp_path / "math/train.jsonl", math).parent,
        tmp_path / "ds.json",
        tmp_path / "verl.parquet",
        tmp_path / "hf",
    ]


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return jsonl(
        tmp_path / "eval/aime24.jsonl",
        [{"problem": LEAK + "?", "answer": "204"}, {"problem": "the VERY leaked, one.", "answer": "7"}],
    )


def run(tool, out: Path, inputs: list[Path], *more: str) -> dict:
    assert tool.main(["--input", *map(str, inputs), "--out", str(out), *more]) == 0
    return json.loads(out.with_suffix(".manifest.json").read_text())


def test_counts_reasons_and_manifest(tool, tmp_path, inputs, evaluation, capsys) -> None:
    out = tmp_path / "train.parquet"
    manifest = run(tool, out, inputs, "--eval", str(evaluation))
    assert manifest["read"] == 13
    assert manifest["dropped"] == {
        "proof": 1, "unverifiable_answer": 1, "broken": 2, "duplicate": 1, "duplicate_other_answer": 1, "contaminated": 2,
    }  # fmt: skip
    assert manifest["rows"] == 5
    assert manifest["sources"] == {"cn_k12": 1, "math": 1, "ds": 1, "torl": 1, "disk": 1}
    assert manifest["sha256"] == tool.file_hash(out)
    assert set(manifest["files"].values()) == {tool.file_hash(f) for f in tool.input_files(inputs)}
    kept = {p.problem: p.answer for p in load_problems(str(out))}
    assert kept == {
        "Add 1 and 2.": "3", "What is half of one?": "\\frac{1}{2}", "How many?": "(2, \\infty)", "Three times four?": "12",
        "Saved to disk: 5+6?": "11",
    }  # fmt: skip
    dropped = [json.loads(line) for line in out.with_suffix(".dropped.jsonl").read_text().splitlines()]
    broken = [(Path(d["file"]).name, d["row"]) for d in dropped if d["reason"] == "broken"]
    assert broken == [("numina.jsonl", 3), ("train.jsonl", 1)]
    assert {d["detail"] for d in dropped if d["reason"] == "contaminated"} == {"ngram: aime24/0", "text: aime24/1"}
    assert "numina.jsonl:4: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "train.parquet.work").exists()


def test_the_same_input_gives_the_same_file(tool, tmp_path, inputs, evaluation) -> None:
    first = run(tool, tmp_path / "a.parquet", inputs, "--eval", str(evaluation))
    second = run(tool, tmp_path / "b.parquet", inputs, "--eval", str(evaluation), "--chunk", "2")
    assert first["rows"] == second["rows"]
    assert load_problems(str(tmp_path / "a.parquet")) == load_problems(str(tmp_path / "b.parquet"))


def test_an_interrupted_run_goes_on_where_it_stopped(tool, tmp_path, inputs, evaluation, monkeypatch) -> None:
    whole = run(tool, tmp_path / "whole.parquet", inputs, "--eval", str(evaluation))
    out = tmp_path / "cut.parquet"
    arguments = ["--input", *map(str, inputs), "--out", str(out), "--eval", str(evaluation), "--chunk", "3"]
    judge, calls = tool.Preparation._judge, 0

    def cut(self, *args):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return judge(self, *args)

    monkeypatch.setattr(tool.Preparation, "_judge", cut)
    with pytest.raises(KeyboardInterrupt):
        tool.main(arguments)
    assert not out.exists()
    monkeypatch.setattr(tool.Preparation, "_judge", judge)
    with_rest = run(tool, out, inputs, "--eval", str(evaluation), "--chunk", "3")
    assert {k: with_rest[k] for k in ("read", "rows", "dropped", "sources")} == {
        k: whole[k] for k in ("read", "rows", "dropped", "sources")
    }
    assert load_problems(str(out)) == load_problems(str(tmp_path / "whole.parquet"))
    lines = [out.with_suffix(".dropped.jsonl"), tmp_path / "whole.dropped.jsonl"]
    assert lines[0].read_text() == lines[1].read_text()


def test_row_groups_are_small_enough_to_shuffle(tool, tmp_path) -> None:
    rows = [{"problem": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(2500)]
    out = tmp_path / "big.parquet"
    run(tool, out, [jsonl(tmp_path / "many.jsonl", rows)], "--chunk", "700")
    file = pq.ParquetFile(out)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1024, 1024, 452]
    assert len(open_problems(str(out))) == 2500


def test_selection_by_learning_curves(tool, tmp_path) -> None:
    rows = [{"problem": f"Problem number {i}?", "answer": str(i), "id": str(i)} for i in range(3)]
    curves = {"p/0-0": [0.2, 0.5, 0.8], "p/1-1": [0.2, 0.5, 0.8], "p/2-2": [1.0, 0.0, 0.0]}
    path = jsonl(tmp_path / "curves.jsonl", [{"problem_id": i, "rewards": r} for i, r in curves.items()])
    manifest = run(tool, tmp_path / "s.parquet", [jsonl(tmp_path / "p.jsonl", rows)], "--curves", str(path))
    assert manifest["rows"] == 2
    assert manifest["dropped"] == {"not_selected": 1}


def test_limr_scores_by_hand() -> None:
    scores = limr_scores({"a": [0.0, 1.0], "b": [1.0, 1.0]})  # mean 0.5, 1.0; scale 0.25
    assert scores == {"a": 0.0, "b": 0.0}
    assert limr_scores({"a": [0.5, 0.5], "b": [0.5, 0.5]}) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match="unlike length"):
        limr_scores({"a": [0.0], "b": [0.0, 1.0]})


def test_bad_calls_are_one_line(tool, tmp_path, capsys) -> None:
    assert tool.main(["--input", str(tmp_path / "none"), "--out", str(tmp_path / "o.parquet")]) == 1
    assert "no such file" in capsys.readouterr().err
    only_broken = jsonl(tmp_path / "b.jsonl", ["{"])
    assert tool.main(["--input", str(only_broken), "--out", str(tmp_path / "o.parquet")]) == 1
    assert "none of the 1 rows is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("204", True), ("\\frac{1}{2}", True), ("(2,\\infty)", True), ("\\text{Evelyn}", True), ("C", True),
        ("1 \\pm \\sqrt{19}", True), ("", False), ("\\int_0^1 x", False), ("x" * 600, False),
        ("See the figure on the next page for it", False),
    ],
)  # fmt: skip
def test_only_golds_that_can_be_checked_are_kept(gold: str, expected: bool) -> None:
    assert is_readable(gold) is expected


def test_dress_makes_no_new_problem_but_a_sign_or_another_script_does() -> None:
    assert fingerprint("Solve $x^2 - 5x = 6$ for the well-known x.") == fingerprint(
        "solve x^2-5x=6 for the well known x"
    )
    problems = ["Compute 7+4", "Compute 7-4", "Compute 7*4", "Find 7<x", "Find 7>x", "计算 7 和 4", "比较 7 和 4"]
    assert len({fingerprint(p) for p in problems}) == len(problems)
    assert Benchmarks([Problem("e/0", "$+$?", "1", "e")]).match("!!") is None


def test_earlier_output_in_an_input_folder_is_no_input(tool, tmp_path, evaluation) -> None:
    folder = jsonl(tmp_path / "in/a.jsonl", [{"problem": "Add 1 and 2.", "answer": "3"}]).parent
    first = run(tool, folder / "train.parquet", [folder])
    second = run(tool, folder / "train.parquet", [folder])
    assert first == second
    assert first["read"] == 1


def test_contamination_is_told_from_likeness() -> None:
    benchmarks = Benchmarks([Problem("e/0", LEAK, "1", "e"), Problem("e/1", "What is 2+2?", "4", "e")])
    assert benchmarks.match("what is $2 + 2$") == ("text", "e/1")
    assert benchmarks.match("So: " + LEAK.upper() + " today") == ("ngram", "e/0")
    assert benchmarks.match("What is 2+3?") is None
    assert benchmarks.match(" ".join(LEAK.split()[:12])) is None
