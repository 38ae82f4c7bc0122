"""Every example, one small step with the real engines, with nothing but PYTHONPATH added."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from torl_runs import LIMIT_S, TORL
from transformers import AutoTokenizer

from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.types import ExecutionStatus, Trajectory

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


def audited(folder: Path) -> list[Trajectory]:
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    audit = subprocess.run([TORL, "view", str(folder), "--audit"], env=env, capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    return [t for group in read_groups(step_path(folder / "trajectories", 0)) for t in group.trajectories]


def test_a_chat_model(tmp_path: Path) -> None:
    found = audited(run("chat", tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES.parent / "conf/quickstart_tools")
    asked = tokenizer.decode(found[0].prompt.token_ids)
    assert asked.startswith("<|im_start|>system\n")
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "python: Runs a Python program" in asked
    calls = [call for t in found for call in t.tool_calls]
    assert calls
    assert {call.tool for call in calls} <= {"python", ""}  # what it has learned to call search is of no tool here
    for call in calls:
        if call.status is ExecutionStatus.OK and call.code.startswith("print(") and call.code.endswith(")"):
            assert call.observation == str(eval(call.code[6:-1]))
    for t in found:
        for turn in t.turns:
            if turn.observation_ids:
                told = "".join(f"\n<tool_response>\n{call.observation}\n</tool_response>" for call in turn.tool_calls)
                shown = f"\n<|im_start|>user{told}<|im_end|>\n<|im_start|>assistant\n"
                assert tokenizer.decode(turn.observation_ids) == shown


def test_two_tools_and_torl_try(tmp_path: Path) -> None:
    folder = run("two_tools", tmp_path)
    found = audited(folder)
    assert max(len(t.tool_calls) for t in found) <= 4
    assert any(call.status is ExecutionStatus.OK for t in found for call in t.tool_calls)
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    checkpoint = sorted((folder / "checkpoints").glob("step_*"))[-1]
    for model in (folder, checkpoint):
        said = subprocess.run(
            [TORL, "try", str(model), "Compute 11*12."], env=env, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert said.returncode == 0, said.stdout + said.stderr
        assert "── problem ──" in said.stdout
        assert "Compute 11*12." in said.stdout
        assert "── assistant ──" in said.stdout
        assert "tokens, ended by" in said.stdout
    lost = subprocess.run(
        [TORL, "try", str(tmp_path), "1"], cwd=EXAMPLES.parent, capture_output=True, text=True, check=False
    )
    assert (lost.returncode, lost.stdout) == (1, "")
    assert lost.stderr.startswith(
        f"torl: error: {tmp_path} is no model: give a run, one of its checkpoints, or a folder"
    )


def test_examples_are_short() -> None:
    files = [file for file in EXAMPLES.iterdir() if file.is_file()]
    assert len(files) >= 4
    assert all(len(file.read_text().splitlines()) <= 60 for file in files)
