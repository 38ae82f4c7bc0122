"""The paper in small: its arms differ in what they say, behaviours are counted, and the page is made of the data."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from torl_mega.config_file import load_config
from torl_mega.data.tokenizer import Tokenizer
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
import reproduction_page as page  # noqa: E402

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


@pytest.mark.parametrize("arm", [*reproduce.SEEDS, "prompted"])
def test_an_arm_changes_what_it_says_and_nothing_else(arm: str) -> None:
    torl, mine = (flat(load_config(ROOT / reproduce.conf_of(name))) for name in ("torl", arm))
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


def data(arm: str, seed: int, before: float, after: float) -> dict[str, Any]:
    rising = [before + (after - before) * i / 39 for i in range(40)]
    evaluation = {
        when: {"accuracy": x, **{f"{f}/accuracy": x for f in page.FAMILIES}}
        for when, x in (("before", before), ("after", after))
    }
    counts = {"answers": 100, "failed": 20, "repaired": 10, "differed": 10, "followed": 5}
    return {
        "arm": arm, "seed": seed, "command": f"torl train conf/paper_small/{arm}.yaml seed={seed}", "config_hash": "0",
        "machine": {"cpu": "a chip", "cores": 2, "python": "3.11"}, "versions": {"torch": "2"}, "wall_s": 60.0,
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
    assert "`runs/reproduction/torl__seed1/view/index.html#step=39&group=3&sample=5`" in text
    assert "````\n2 and 3?\n 6. Check: `5`. So \\boxed{5}.\n````" in text
    assert (
        "| (a) tool RL beats RL without | lower 95 % bound of the paired difference > 0.15 | +0.520 ± 0.025, 3 seeds | held |"
        in text
    )
    assert "| (a) RL without a tool improves too | mean after > mean before | 0.200 → 0.300 | held |" in text
    assert "| (d) C = 2 beats C = 1 on choose and chain | one-sided paired t-test over seeds, p < 0.05 | -0.040" in text
    assert "**failed**" in text
    assert (
        "| (e) −0.5 for failing programs is no gain | 95 % interval of the difference contains 0 or is below | not run | – |"
        in text
    )
    assert "**Not run:**" in text
    assert {p.name for p in (docs / "img").iterdir()} == {
        "reproduction_accuracy.png", "reproduction_code.png", "reproduction_calls.png"
    }  # fmt: skip
    page.write(folder, docs)
    assert (docs / "reproduction.md").read_text() == text


def test_moving_means_that_rise_have_rank_correlation_one() -> None:
    assert page.rank_correlation([float(i) for i in range(40)]) == pytest.approx(1.0)
    assert page.rank_correlation([float(-i) for i in range(40)]) == pytest.approx(-1.0)
    assert page.rank_correlation([0.5] * 40) == 0.0


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
