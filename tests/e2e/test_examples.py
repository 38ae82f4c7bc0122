"""Every example, one small step with the real engines, with nothing but PYTHONPATH added."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from torl_runs import LIMIT_S, TORL

from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.types import ExecutionStatus

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (
    "num_steps=1",
    "eval.data=[]",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "trainer.mini_batch_samples=16",
)

pytestmark = pytest.mark.timeout(600)


def run(name: str, runs: Path) -> Path:
    command = [TORL, "train", str(EXAMPLES / f"{name}.yaml"), *SMALL, f"runs_dir={runs}", "checkpoint.export_hf=false"]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        command, env=env, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / name


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    folder = run("own_reward", tmp_path)
    row = next(r for r in map(json.loads, (folder / "metrics.jsonl").open()) if r["kind"] == "train")
    assert row["reward"] == pytest.approx(row["reward/right"] + row["reward/short"])
    assert row["accuracy"] == pytest.approx((row["reward/right"] + 1) / 2)
    audit = subprocess.run([TORL, "view", str(folder), "--audit"], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_data_of_ones_own(tmp_path: Path) -> None:
    groups = read_groups(step_path(run("own_data", tmp_path) / "trajectories", 0))
    for group in groups:
        problem = group.prompt.problem
        assert str(eval(problem.problem)) == problem.answer
        assert problem.extra["digits"] in (2, 3, 4)


def test_a_tool_of_ones_own(tmp_path: Path) -> None:
    folder = run("own_tool", tmp_path)
    calls = [
        c
        for group in read_groups(step_path(folder / "trajectories", 0))
        for t in group.trajectories
        for c in t.tool_calls
    ]
    assert calls
    for call in calls:
        program = call.code.strip().removeprefix("print")
        right = call.status is ExecutionStatus.OK and call.observation == f"\n{eval(program)}\n```\n"
        assert right or "not arithmetic" in call.observation or "no call found" in call.observation
    audit = subprocess.run([TORL, "view", str(folder), "--audit"], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_examples_are_short() -> None:
    files = [file for file in EXAMPLES.iterdir() if file.is_file()]
    assert len(files) >= 4
    assert all(len(file.read_text().splitlines()) <= 60 for file in files)
