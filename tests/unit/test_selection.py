"""Which groups and attempts a step trains on: refill, GRPO-RoC, retired problems, groups without signal, penalties."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torl_mega.config_file import load_config
from torl_mega.data.prompts import PromptSource
from torl_mega.rollout.collector import LiveCollector
from torl_mega.rollout.filters import has_signal, resample_on_correct, roughness
from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.rollout.samples import make_samples
from torl_mega.run.folder import RunFolder
from torl_mega.types import (
    CollectedGroups,
    ExecutionStatus,
    GraderStatus,
    Group,
    Problem,
    Prompt,
    Reward,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

PROMPT = Prompt(Problem("s/0", "1+1", "2", "s"), (1, 2))


def attempt(
    index: int, correct: bool, *, calls: int = 0, failed: int = 0, penalty: float = 0.0, prompt: Prompt = PROMPT
):
    statuses = [ExecutionStatus.ERROR] * failed + [ExecutionStatus.OK] * (calls - failed)
    turns = [Turn((5,), (-0.5,), (0,), "x", ToolCall("1", s, 0, "o", 0.0), (6,)) for s in statuses]
    turns.append(Turn((7,), (-0.5,), (0,), "\\boxed{2}"))
    parts = {"answer": 1.0 if correct else -1.0, "tool_cost": penalty}
    return (
        Trajectory(prompt, index, tuple(turns), StopReason.EOS),
        Reward(sum(parts.values()), correct, GraderStatus.OK, "2", parts),
    )


def group_of(*attempts: tuple[Trajectory, Reward], prompt: Prompt = PROMPT) -> Group:
    return Group(prompt, tuple(t for t, _ in attempts), tuple(r for _, r in attempts))


# ------------------------------------------------------------------------------------------------ attempts of a group


@settings(max_examples=100, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=32),
    size=st.integers(1, 16),
)
def test_resampling_keeps_shares_both_signs_and_the_cleanest(kinds: list[tuple[bool, int, int]], size: int) -> None:
    group = group_of(*(attempt(i, ok, calls=a + b, failed=a) for i, (ok, a, b) in enumerate(kinds)))
    kept = resample_on_correct(group, size)
    if len(kinds) <= size:
        assert kept is group
        return
    assert len(kept.rewards) == size
    indices = [t.sample_index for t in kept.trajectories]
    assert indices == sorted(indices)
    right, wrong = ({i for i, (ok, _, _) in enumerate(kinds) if ok is sign} for sign in (True, False))
    for sign in (right, wrong):
        assert len(sign & set(indices)) >= min(len(sign), 2, size // 2)
    dropped = right - set(indices)
    if dropped and right & set(indices):
        worst_kept = max(roughness(group.trajectories[i]) for i in right & set(indices))
        assert worst_kept <= min(roughness(group.trajectories[i]) for i in dropped)
    assert wrong & set(indices) == set(sorted(wrong)[: len(wrong & set(indices))])


def test_roughness_by_hand() -> None:
    assert roughness(attempt(0, True)[0]) == 0.5  # no call; one box
    assert roughness(attempt(0, True, calls=4, failed=1)[0]) == 0.25
    two_boxes = Trajectory(PROMPT, 0, (Turn((1,), (0.0,), (0,), "\\boxed{1} \\boxed{2}"),), StopReason.EOS)
    assert roughness(two_boxes) == 1.5


def algo(**over: Any) -> Any:
    return load_config("conf/base.yaml", [f"algo.{k}={v}" for k, v in over.items()]).algo


def test_groups_without_signal_are_left_out_of_every_divisor() -> None:
    alike = group_of(attempt(0, True), attempt(1, True))
    mixed = group_of(attempt(0, True), attempt(1, False))
    kept, dropped = make_samples([alike, mixed], algo()), make_samples([alike, mixed], algo(zero_signal="drop"))
    assert [s.loss_mask.any() for s in kept] == [True] * 4
    assert [s.loss_mask.any() for s in dropped] == [False, False, True, True]
    assert [s.group for s in dropped] == [0, 0, 1, 1]


def test_a_small_penalty_in_an_all_correct_group_becomes_no_large_advantage() -> None:
    group = group_of(*(attempt(i, True) for i in range(15)), attempt(15, True, penalty=-0.05))
    in_reward = [s.advantage for s in make_samples([group], algo())]
    assert in_reward[15] == pytest.approx(-3.75, rel=1e-3)
    on_advantage = [s.advantage for s in make_samples([group], algo(penalties="advantage"))]
    assert on_advantage == [0.0] * 16
    half = group_of(
        attempt(0, True, penalty=-0.05), attempt(1, True, penalty=-9.0), attempt(2, False), attempt(3, False)
    )
    first, second, *_ = (s.advantage for s in make_samples([half], algo(penalties="advantage", penalty_bound=0.25)))
    plain = np.sqrt(3) / 2  # of +1, +1, -1, -1 with the unbiased std
    assert first == pytest.approx(plain - 0.05, rel=1e-4)
    assert second == pytest.approx(plain * 0.75, rel=1e-4)


def own_parts(*rewards: dict[str, float]) -> Group:
    """Attempts scored by a user's function, whose parts have other names."""
    made = [attempt(i, True) for i in range(len(rewards))]
    scored = [Reward(sum(parts.values()), True, GraderStatus.OK, "2", parts) for parts in rewards]
    return group_of(*((t, r) for (t, _), r in zip(made, scored, strict=True)))


def test_penalties_are_told_from_the_parts_of_a_users_function() -> None:
    alike = own_parts(*[{"right": 1.0, "tool_cost": 0.0}] * 7, {"right": 1.0, "tool_cost": -0.05})
    assert [s.advantage for s in make_samples([alike], algo(penalties="advantage"))] == [0.0] * 8
    styled = own_parts({"answer": -1.0, "style": 0.5}, {"answer": 1.0, "style": 0.0})
    advantages = [s.advantage for s in make_samples([styled], algo(penalties="advantage"))]
    assert advantages == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-4)  # of -0.5 and 1 with the unbiased std


@pytest.mark.parametrize("penalties", ["reward", "advantage"])
def test_penalties_alone_are_no_signal_to_keep_a_group_for(penalties: str) -> None:
    """DAPO, 2503.14476 eq. 11: neither none nor all of the answers are right."""
    wrong = group_of(attempt(0, False), attempt(1, False, penalty=-0.5))
    mixed = group_of(attempt(0, False), attempt(1, True))
    assert not has_signal(wrong, algo(penalties=penalties))
    assert has_signal(mixed, algo(penalties=penalties))
    assert not has_signal(own_parts({"mine": 0.3, "overlong": 0.0}, {"mine": 0.3, "overlong": -0.2}), algo())


def cut_off(attempted: tuple[Trajectory, Reward]) -> tuple[Trajectory, Reward]:
    trajectory, reward = attempted
    return dataclasses.replace(trajectory, stop_reason=StopReason.LENGTH), reward


def test_answers_that_are_masked_are_no_signal_to_keep_a_group_for() -> None:
    """Two right answers beside fourteen that ran out of budget: all that is trained on earns the same."""
    group = group_of(*(attempt(i, True) for i in range(2)), *(cut_off(attempt(i, False)) for i in range(2, 16)))
    assert has_signal(group, algo())
    assert not has_signal(group, algo(mask_truncated="true"))
    refilled = make_samples([group], algo(mask_truncated="true", zero_signal="refill"))
    assert not any(s.loss_mask.any() for s in refilled)


def test_what_a_refill_replaces_is_not_trained_on_when_its_rounds_are_used_up() -> None:
    """A penalty in the reward gives a group of wrong answers advantages; a refill holds it for one without signal all the same."""
    group = group_of(*(attempt(i, False) for i in range(15)), attempt(15, False, penalty=-0.05))
    kept, refilled = (make_samples([group], algo(zero_signal=kind)) for kind in ("keep", "refill"))
    assert kept[15].advantage == pytest.approx(-3.75, rel=1e-3)
    assert kept[15].loss_mask.any()
    assert not any(s.loss_mask.any() for s in refilled)


# ------------------------------------------------------------------------------------------------ prompts of a step


class Solver:
    """A scheduler whose answers depend on the problem alone: `right(number)` of its attempts are correct."""

    def __init__(self, right: Any) -> None:
        self.right, self.asked, self.seeds = right, [], []
        self.fail_at: int | None = None

    def collect(
        self, episode: Any, prompts: Any, *, group_size: int, seed: int, keep: int | None = None
    ) -> CollectedGroups:
        if len(self.asked) == self.fail_at:
            self.fail_at = None
            raise RuntimeError("servers are gone")
        self.asked.append([p.problem.problem for p in prompts])
        self.seeds.append(seed)
        groups = []
        for prompt in prompts[:keep]:
            right = self.right(int(prompt.problem.answer))
            groups.append(group_of(*(attempt(i, i < right, prompt=prompt) for i in range(group_size)), prompt=prompt))
        return CollectedGroups(tuple(groups), {"retry": 1}, 1.0)


def collector(tmp_path: Path, solver: Solver, *overrides: str) -> LiveCollector:
    path = tmp_path / "n.jsonl"
    path.write_text("".join(json.dumps({"problem": f"p{i}", "answer": str(i)}) + "\n" for i in range(20)))
    config = load_config(
        "conf/base.yaml",
        [
            f"data.train={path}", "data.template='{problem}'", "data.shuffle=false", "rollout.prompts_per_step=4",
            "rollout.group_size=4", "trainer.mini_batch_samples=16", *overrides,
        ],
    )  # fmt: skip
    return LiveCollector(
        config=config,
        folder=RunFolder(tmp_path),
        prompts=PromptSource(config.data, lambda problem: list(problem.problem.encode()), seed=0),
        benchmarks=(),
        episode=SimpleNamespace(),  # type: ignore[arg-type]
        scheduler=solver,  # type: ignore[arg-type]
        expect_version=lambda version: None,
        counters=lambda: Counter(),
    )


def numbers(found: Any) -> list[int]:
    """Of the problems that are trained on: the prompt is the problem's bytes, the response one token."""
    return sorted({int(bytes(s.token_ids[:-1].tolist()).decode()[1:]) for s in found.samples})


def test_a_step_is_refilled_until_it_has_signal(tmp_path: Path) -> None:
    solver = Solver(lambda n: 2 if n % 2 else 4)  # even problems are all right
    rollouts = collector(tmp_path, solver, "algo.zero_signal=refill")
    batch = rollouts.collect(0)
    assert numbers(batch) == [1, 3, 5, 7]
    assert [len(asked) for asked in solver.asked] == [4, 2, 1, 1]
    assert len(set(solver.seeds)) == 4
    assert (batch.metrics["refill_rounds"], batch.metrics["refilled_groups"]) == (3, 4)
    assert batch.metrics["accuracy"] == pytest.approx(0.75)  # of everything that was sampled
    assert batch.metrics["faults/retry"] == 4
    assert all(s.loss_mask.any() for s in batch.samples)
    groups = read_groups(step_path(tmp_path / "trajectories", 0))
    assert [g.prompt.problem.answer for g in groups] == ["1", "3", "5", "7"]


def test_a_refill_is_bounded_and_fills_up_with_masked_groups(tmp_path: Path) -> None:
    solver = Solver(lambda n: 2 if n == 5 else 0)
    batch = collector(tmp_path, solver, "algo.zero_signal=refill", "rollout.refill_rounds=2").collect(0)
    assert [len(asked) for asked in solver.asked] == [4, 4, 3]
    assert len(batch.samples) == 16
    assert sum(s.loss_mask.any() for s in batch.samples) == 4


def test_a_dropped_refill_loses_no_prompt_and_is_collected_again_alike(tmp_path: Path) -> None:
    calm, rough = Solver(lambda n: 2 if n % 2 else 4), Solver(lambda n: 2 if n % 2 else 4)
    wanted = collector(tmp_path, calm, "algo.zero_signal=refill")
    first, second = wanted.collect(0), wanted.collect(1)
    rollouts = collector(tmp_path, rough, "algo.zero_signal=refill")
    rough.fail_at = 2
    with pytest.raises(RuntimeError, match="gone"):
        rollouts.collect(0)
    again = rollouts.collect(0)
    resumed = collector(tmp_path, rough, "algo.zero_signal=refill")
    resumed.restore(rollouts.state())
    for a, b in ((first, again), (second, resumed.collect(1))):
        assert numbers(a) == numbers(b)
        assert [s.advantage for s in a.samples] == [s.advantage for s in b.samples]


def test_prompts_that_a_refill_cut_off_go_back(tmp_path: Path) -> None:
    solver = Solver(lambda n: 2 if n % 2 else 4)
    rollouts = collector(tmp_path, solver, "algo.zero_signal=refill", "rollout.oversample=2")
    assert numbers(rollouts.collect(0)) == [1, 3, 5, 7]
    assert solver.asked[1][0] == "p4"  # the first round was asked for eight and kept four
    assert rollouts.collect(1).metrics["refill_rounds"] == 3
    assert solver.asked[4][0] == "p8"


def test_more_attempts_are_made_than_kept(tmp_path: Path) -> None:
    rollouts = collector(tmp_path, Solver(lambda n: 6), "rollout.attempts_per_prompt=8")
    batch = rollouts.collect(0)
    assert len(batch.samples) == 16
    assert batch.metrics["accuracy"] == pytest.approx(6 / 8)
    assert [s.reward for s in batch.samples] == [1.0, 1.0, -1.0, -1.0] * 4


def test_mastered_problems_are_not_drawn_again_and_the_cursor_remembers(tmp_path: Path) -> None:
    solver = Solver(lambda n: 4 if n < 10 else 1)
    rollouts = collector(tmp_path, solver, "data.retire_above=0.9")
    for step in range(5):  # one epoch of 20
        rollouts.collect(step)
    resumed = collector(tmp_path, solver, "data.retire_above=0.9")
    resumed.restore(json.loads(json.dumps(rollouts.state())))
    resumed.collect(5)
    assert solver.asked[5] == ["p10", "p11", "p12", "p13"]


def test_when_all_are_mastered_all_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solver = Solver(lambda n: 4)
    rollouts = collector(tmp_path, solver, "data.retire_above=1.0")
    for step in range(6):
        rollouts.collect(step)
    assert solver.asked[5] == ["p0", "p1", "p2", "p3"]
    assert "every problem" in caplog.text
