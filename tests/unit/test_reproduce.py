"""The paper in small: its arms differ in what they say, behaviours are counted, and the page is made of the data."""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from torl_mega.config_file import load_config
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.data.word_problems import FAMILIES
from torl_mega.rollout.recorder import write_step
from torl_mega.types import (
    ExecutionStatus,
    GraderStatus,
    Problem,
    Prompt,
    Reward,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import paper_controls  # noqa: E402
import paper_traces  # noqa: E402
import reproduce  # noqa: E402
import reproduction_checks as checks  # noqa: E402
import reproduction_page as page  # noqa: E402
from reproduction_data import ARMS, command, conf_of, recipe_of  # noqa: E402

CHANGED = {
    "no_tool": {"rollout.max_tool_calls"},
    "c2": {"rollout.max_tool_calls"},
    "code_error": {"reward.code_error"},
    "noise": {"rollout.tools"},
    "lot": {"reward.function"},
    "observations": {"algo.train_on_observations", "algo.old_logprobs"},
    "prompted": set(),
}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in (config if isinstance(config, dict) else config.model_dump(mode="json")).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("arm", [*ARMS, "prompted"])
def test_an_arm_changes_what_it_says_and_nothing_else(arm: str) -> None:
    torl, mine = (flat(load_config(ROOT / conf_of(name))) for name in ("torl", arm))
    changed = {key for key in mine if mine[key] != torl.get(key)} - {"name"}
    if arm == "plus":
        plus = flat(load_config(ROOT / "conf/plus.yaml"))
        assert all(mine[key] == plus[key] for key in changed)
        assert "algo.zero_signal" in changed
    elif arm != "torl":
        assert changed == CHANGED[arm]


def test_the_recipe_of_the_small_paper_is_the_papers() -> None:
    small, base = (flat(load_config(ROOT / conf)) for conf in ("conf/paper_small/torl.yaml", "conf/base.yaml"))
    same = [key for key in base if key.startswith(("algo.", "reward.")) and key != "reward.grader_workers"]
    assert {key for key in same if small[key] != base[key]} <= {"algo.old_logprobs"}
    assert small["trainer.mini_batch_samples"] == small["rollout.prompts_per_step"] * small["rollout.group_size"]


def attempt(*turns: Turn) -> Trajectory:
    problem = Problem("sums/0/0", "What is 2 plus 3?", "5", "sums", {})
    return Trajectory(Prompt(problem, (1, 2)), 0, turns, StopReason.EOS)


def turn(text: str, status: ExecutionStatus | None = None, code: str = "", printed: str = "") -> Turn:
    call = None if status is None else ToolCall(code, status, 0, f"\n{printed}\n```\n", 0.0)
    return Turn((1,), (0.0,), (0,), text, call, (2,) if call else ())


def test_behaviours_are_counted() -> None:
    ok, failed = ExecutionStatus.OK, ExecutionStatus.ERROR
    block = "\n```python\n{}\n```\n```output"
    right = Reward(1.0, True, GraderStatus.OK, "5", {"answer": 1.0})
    repaired = attempt(
        turn(block.format("prnt(2+3)"), failed, "prnt(2+3)", "NameError"),
        turn(block.format("print(2+3)"), ok, "print(2+3)", "5"),
        turn("So \\boxed{5}."),
    )
    repeated = attempt(*(turn(block.format("x"), failed, "x", "NameError") for _ in range(2)), turn("So \\boxed{5}."))
    followed = attempt(turn(" It is 6. Check:" + block.format("print(5)"), ok, "print(5)", "5"), turn("So \\boxed{5}."))
    agreed = attempt(turn(" It is 5. Check:" + block.format("print(5)"), ok, "print(5)", "5"), turn("So \\boxed{5}."))
    plain = attempt(turn(" 2+3=5. So \\boxed{5}."))
    answers = (repaired, repeated, followed, agreed, plain)
    counts = reproduce.behaviour([reproduce.Attempt(f"group={n}", t, right) for n, t in enumerate(answers)])
    examples = counts.pop("examples")
    assert counts == {"answers": 5, "failed": 2, "repaired": 1, "differed": 1, "followed": 1}
    assert {kind: [e["address"] for e in found] for kind, found in examples.items()} == {
        "repaired": ["group=0"],
        "followed": ["group=2"],
    }
    assert examples["followed"][0]["text"] == followed.response_text


EXAMPLES = {
    "repaired": [],
    "followed": [
        {"address": "step=39&group=3&sample=5", "problem": "2 and 3?", "text": " 6. Check: `5`. So \\boxed{5}."}
    ],
}


VERSIONS = {
    "python": "3.11",
    "chip": "2 × a chip",
    "torch": "2",
    "megatron-core": "0",
    "sglang": "0",
    "transformers": "5",
}


def data(arm: str, seed: int, before: float, after: float) -> dict[str, Any]:
    rising = [before + (after - before) * i / 39 for i in range(40)]
    evaluation = {
        when: {"accuracy": x, "reward": 2 * x - 1, "no_answer_ratio": 0.25, **{f"{f}/accuracy": x for f in FAMILIES}}
        for when, x in (("before", before), ("after", after))
    }
    counts = {"answers": 100, "failed": 20, "repaired": 10, "differed": 10, "followed": 5}
    return {
        "arm": arm, "seed": seed, "recipe": recipe_of(load_config(ROOT / conf_of(arm)).model_dump(mode="json")),
        "base_sha256": "0" * 64, "versions": VERSIONS, "wall_s": 60.0, "total_s": 90.0,
        "max_abs_logprob_diff": 1e-5, "curves": dict.fromkeys(reproduce.CURVES, rising), "eval": evaluation,
        "behaviour": {"before": counts, "after": counts | {"repaired": 20, "examples": EXAMPLES}},
    }  # fmt: skip


def test_the_page_is_made_of_the_data_and_says_what_failed(tmp_path: Path) -> None:
    folder, docs = tmp_path / "data", tmp_path / "docs"
    folder.mkdir()
    (docs / "img").mkdir(parents=True)
    for seed in (1, 2, 3):
        for arm, after in (("torl", 0.8 + 0.01 * seed), ("no_tool", 0.3), ("c2", 0.8 - 0.01 * seed)):
            (folder / f"{arm}_{seed}.json").write_text(json.dumps(data(arm, seed, 0.2, after)))
    page.write(folder, docs)
    text = (docs / "reproduction.md").read_text()
    assert "`torl__seed1/view/index.html#step=39&group=3&sample=5`" in text
    assert "````\n2 and 3?\n 6. Check: `5`. So \\boxed{5}.\n````" in text
    assert (
        "| (a) tool RL beats RL without | lower 95 % bound of the paired difference > 0.15 | +0.520 ± 0.025, 3 seeds | held |"
        in text
    )
    answered = "a boxed answer is given by 0.75 → 0.75, of those right 0.27 → 0.40"
    assert f"mean after > mean before | 0.200 → 0.300 (+0.100 ± 0.000); {answered} | held |" in text
    assert "| (d) C = 2 beats C = 1 on choose and chain | one-sided paired t-test over seeds, p < 0.05 | -0.040" in text
    assert "**failed**" in text
    assert (
        "| (e) −0.5 for failing programs is no gain | 95 % interval of the difference contains 0 or is below | not run | – |"
        in text
    )
    assert "**Not run:**" in text
    assert "| `torl train conf/paper_small/torl.yaml seed=N name=torl__seedN` | 1, 2, 3 of 5 | 40 | 1.0 |" in text
    assert "of 3" not in next(line for line in text.splitlines() if "c2.yaml" in line), "all that are wanted"
    assert "| ToRL, C = 2 | a program fails, another one ends OK | 10/20, 10/20, 10/20 | 20/20, 20/20, 20/20 |" in text
    assert {p.name for p in (docs / "img").iterdir()} == {
        "reproduction_accuracy.png", "reproduction_code.png", "reproduction_calls.png"
    }  # fmt: skip
    page.write(folder, docs)
    assert (docs / "reproduction.md").read_text() == text


def test_moving_means_that_rise_have_rank_correlation_one() -> None:
    of = lambda values: checks.rank_correlation(checks.moving_means(values))  # noqa: E731
    assert of([float(i) for i in range(40)]) == pytest.approx(1.0)
    assert of([float(-i) for i in range(40)]) == pytest.approx(-1.0)
    assert of([0.5] * 40) is None


def runs(**seeds: list[tuple[float, float]]) -> dict[str, list[dict[str, Any]]]:
    """Of each arm the accuracies before and after, seed by seed."""
    return {arm: [data(arm, n + 1, *x) for n, x in enumerate(seeds.get(arm, []))] for arm in ARMS}


def test_what_cannot_be_decided_says_why() -> None:
    nothing, one = runs(), runs(torl=[(0.2, 0.9)], no_tool=[(0.2, 0.3)])
    assert {(check(nothing).found, check(nothing).held) for _, _, check in checks.checks()} == {("not run", None)}
    assert checks.tool_gain(one) == checks.Outcome("one seed, no interval")
    assert checks.second_call(one) == checks.Outcome("not run")
    constant = runs(torl=[(0.9, 0.9), (0.2, 0.9)])
    outcome = checks.rising("code_ratio")(constant)
    assert outcome.found == "constant, 1.00; of single steps constant, 1.00; 0.57 → 0.88"
    assert outcome.held is False, "the mean of the seeds decides"
    short = runs(torl=[(0.2, 0.9)])
    short["torl"][0]["curves"]["code_ratio"] = [0.1] * 17
    assert checks.rising("code_ratio")(short) == checks.Outcome("fewer than 18 steps")


def test_second_call_and_penalty_against_t_by_hand() -> None:
    """Differences 0.01, 0.03, 0.05: mean 0.03, std 0.02, t = 2.598 with two degrees of freedom; one-sided p = 0.061."""
    ours = runs(torl=[(0.2, 0.8)] * 3, c2=[(0.2, 0.81), (0.2, 0.83), (0.2, 0.85)], code_error=[(0.2, 0.9)] * 3)
    second = checks.second_call(ours)
    assert second.found.startswith("+0.030 ± 0.050, p = 0.061, 3 seeds; C = 1 leaves 0.200")
    assert second.held is False
    assert checks.penalty(ours).held is False, "a gain of 0.1 in every seed"
    assert checks.second_call(runs(torl=[(0.2, 0.8)] * 2, c2=[(0.2, 0.9)] * 2)).held is True


def test_a_run_of_other_settings_shows_them() -> None:
    run = data("torl", 1, 0.2, 0.9)
    assert command(run) == "torl train conf/paper_small/torl.yaml seed=N name=torl__seedN"
    run["recipe"]["optim.lr"] = 0.5
    run["recipe"]["algo.no_longer_there"] = 1
    assert command(run).endswith(" optim.lr=0.5")
    assert command(data("noise", 1, 0.2, 0.9)).startswith("PYTHONPATH=tools torl train")


def test_a_run_is_read_as_it_was_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole tool on a finished run of another length and settings, on one that cannot start, and on a wrong setting."""
    docs, folder = tmp_path / "docs", tmp_path / "runs/torl__seed2"
    (docs / "img").mkdir(parents=True)
    words = ["optim.lr=0.5", "num_steps=5"]
    finished_run(folder, *words, steps=5)
    finished_run(tmp_path / "runs/torl__seed1", "optim.lr=0.25", "num_steps=5", steps=4)  # which has another recipe
    monkeypatch.setattr(reproduce, "DATA", docs / "reproduction")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["reproduce", *words, "--runs-dir", str(tmp_path / "runs"), "--arms", "torl", "--seeds", "1", "2"],
    )
    shutil.copytree(ROOT / "conf/paper_small/model", tmp_path / "conf/paper_small/model")
    assert reproduce.main() == 1
    (found,) = (json.loads(path.read_text()) for path in (docs / "reproduction").glob("*.json"))
    assert (found["seed"], found["recipe"]["optim.lr"], found["versions"]["chip"]) == (2, 0.5, "2 × a chip")
    text = (docs / "reproduction.md").read_text()
    assert "seed=N name=torl__seedN num_steps=5 optim.lr=0.5` | 2 of 5 | 5 |" in text
    said = capfd.readouterr().err
    assert "torl: error:" in said
    assert "holds a run with another recipe (optim.lr: 0.25 there, 0.5 here)" in said
    assert "reproduce: error: did not finish: torl__seed1 (exit code 1)" in said
    monkeypatch.setattr(sys, "argv", ["reproduce", "optim.no=1", "--runs-dir", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match=r"optim\.no = 1 is not a setting"):
        reproduce.main()


def finished_run(folder: Path, *overrides: str, steps: int) -> None:
    """A run's folder as far as it is read."""
    folder.mkdir(parents=True)
    measures = dict.fromkeys([*reproduce.CURVES, "reward", "accuracy", "no_answer_ratio"], 0.5)
    rows = [{"kind": "train", "step": n, **measures} for n in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "steps": steps,
        "eval": {"before": measures, "after": measures},
        "wall_s": {"total": 90.0},
        "mismatch": {"max_abs_logprob_diff": 1e-5},
    }
    places = [f"name={folder.name}", f"runs_dir={folder.parent}", f"seed={folder.name[-1]}"]
    config = load_config(ROOT / conf_of("torl"), [*places, *overrides]).model_dump(mode="json")
    for name, content in (("summary", summary), ("config", {"config": config}), ("versions", [VERSIONS])):
        (folder / f"{name}.json").write_text(json.dumps(content))
    for step in range(steps):
        write_step(folder / "trajectories", step, [], [])


def test_the_page_is_that_of_the_committed_data(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    page.write(ROOT / "docs/reproduction", tmp_path)
    assert (tmp_path / "reproduction.md").read_text() == (ROOT / "docs/reproduction.md").read_text(), "make reproduce"


def test_controls_know_nothing_of_the_answer() -> None:
    noise = paper_controls.Noise()
    said = {asyncio.run(noise(f"print({a}+{b})")) for a in range(20) for b in range(20)}
    assert len(said) > 100
    problem = Problem("sums/0/0", "What is 2 plus 3?", "5", "sums", {})
    problem_of = Prompt(problem, (1,))
    right, wrong = (
        [
            paper_controls.by_lot(Trajectory(problem_of, i, (turn(f"\\boxed{{{x}}}"),), StopReason.EOS), problem)
            for i in range(2000)
        ]
        for x in (5, 6)
    )
    assert [r["lot"] for r in right] == [r["lot"] for r in wrong]
    assert {r["correct"] for r in right} == {True}
    assert {r["correct"] for r in wrong} == {False}
    assert statistics.fmean(r["lot"] > 0 for r in right) == pytest.approx(paper_controls.SHARE, abs=0.04)


def test_the_shipped_base_is_the_one_of_its_card() -> None:
    model = ROOT / "conf/paper_small/model"
    card = (model / "README.md").read_text()
    settings = load_config(ROOT / "conf/paper_small/base.yaml")
    assert f"{settings.num_steps} steps of {settings.pretrain.rows_per_step} generated answers" in card
    assert all(f"| {name} | {value} |" in card for name, value in asdict(paper_traces.MIX).items())
    Tokenizer(model).check_lossless()
    assert sum(file.stat().st_size for file in model.iterdir()) < 20e6
