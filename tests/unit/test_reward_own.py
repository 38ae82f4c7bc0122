"""A reward function of the user's: in the real grader process, from a folder that only PYTHONPATH names."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from torl_mega.config import RewardConfig
from torl_mega.errors import ConfigError
from torl_mega.reward.function import make_reward
from torl_mega.types import GraderStatus, Problem, Prompt, Reward, StopReason, Trajectory, Turn

MODULE = """
import asyncio, os, time

def length(trajectory, problem):
    return len(trajectory.turns[-1].text) / 10

async def parts(trajectory, problem):
    await asyncio.sleep(0)
    return {"close": 0.25, "kind": problem.extra["kind"], "correct": trajectory.turns[-1].text == problem.answer}

def bad(trajectory, problem):
    text = trajectory.turns[-1].text
    if text == "raise":
        raise KeyError("no such key")
    if text == "hang":
        time.sleep(100)
    if text == "die":
        os._exit(3)
    return {"nan": float("nan"), "text": "3 points", "none": None, "taken": {"overlong": 1.0}, "empty": {}, "ok": 1}[text]

not_callable = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_rewards.py").write_text(MODULE)
    (tmp_path / "their_broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def attempt(text: str, tokens: int = 3) -> Trajectory:
    prompt = Prompt(Problem("s/0", "2+2", "4", "s", extra={"kind": 2}), (1,))
    turn = Turn((1,) * tokens, (0.0,) * tokens, (0,) * tokens, text)
    return Trajectory(prompt, 0, (turn,), StopReason.EOS)


def scores(function: str, *attempts: Trajectory, **settings: object) -> tuple[list[Reward], Counter[str]]:
    config = RewardConfig.model_validate(
        {"correct": 1.0, "wrong": -1.0, "grader_workers": 1, "function": function, **settings}
    )

    async def run() -> list[Reward]:
        await reward.start()
        try:
            return list(await asyncio.gather(*(reward.score(t) for t in attempts)))
        finally:
            await reward.close()

    reward = make_reward(config, max_response_tokens=100)
    return asyncio.run(run()), reward.counters


def test_a_number_is_the_reward_and_its_sign_says_right(own: None) -> None:
    (long, none), _ = scores("their_rewards:length", attempt("a" * 15), attempt(""))
    assert (long.value, long.parts, long.correct, long.status) == (1.5, {"function": 1.5}, True, GraderStatus.OK)
    assert (none.value, none.correct) == (0.0, False)  # the middle itself is not right


def test_parts_of_an_async_function_add_to_the_shaping(own: None) -> None:
    (right, wrong), _ = scores(
        "their_rewards:parts", attempt("4"), attempt("5", tokens=100), overlong=-0.5, overlong_buffer_tokens=50
    )
    assert right.parts == {"close": 0.25, "kind": 2.0, "overlong": 0.0}
    assert (right.value, right.correct) == (2.25, True)
    assert wrong.parts == {"close": 0.25, "kind": 2.0, "overlong": -0.5}
    assert (wrong.value, wrong.correct) == (1.75, False)


def test_what_fails_is_a_fault_and_never_a_reward(own: None, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["raise", "hang", "die", "nan", "text", "none", "taken", "empty", "ok"]
    found, counters = scores("their_rewards:bad", *map(attempt, texts), grader_timeout_s=1.0)
    assert [reward.status for reward in found] == [GraderStatus.FAULT] * 8 + [GraderStatus.OK]
    assert found[-1].value == 1.0
    assert counters["reward_failed"] + counters["reward_timeout"] == 8
    said = caplog.text
    assert "s/0: reward.function = their_rewards:bad: KeyError: 'no such key' (" in said
    assert "their_rewards.py:14)" in said
    assert "took longer than 1 s" in said
    assert "nan is no finite number" in said
    assert "'3 points' is no finite number" in said
    assert "'overlong' cannot be the name of a part" in said
    assert "it returned no part" in said


def test_numpys_truth_is_one(own: None) -> None:
    from torl_mega.reward.own import outcome

    assert outcome({"a": np.float32(0.5), "correct": np.isclose(1.0, 1.0)}) == {"parts": {"a": 0.5}, "correct": True}
    assert "no bool" in outcome({"a": 1.0, "correct": np.int64(1)})["error"]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("their_rewords:length", "No module named 'their_rewords'; put the folder that holds it on PYTHONPATH"),
        ("their_rewards:lenght", "their_rewards has no lenght"),
        ("their_rewards:not_callable", "holds no callable not_callable"),
        ("their_broken:x", "No module named 'nothing_of_that_name'; its import fails"),
    ],
)
def test_one_that_is_not_there_is_one_line(own: None, function: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scores(function, attempt("4"))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["length", "a/b:c", "a:b:c", ""])
def test_other_forms_are_refused_when_the_config_is_read(path: str) -> None:
    with pytest.raises(ValidationError, match=r"is not of the form pkg\.module:name"):
        RewardConfig.model_validate({"correct": 1.0, "wrong": -1.0, "function": path})
