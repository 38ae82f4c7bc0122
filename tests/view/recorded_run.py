"""Runs on disk for the viewer's tests: texts are encoded by the shipped tokenizer, numbers are drawn from a seed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torl_mega.data.tokenizer import Tokenizer
from torl_mega.rollout.benchmark_table import transcript
from torl_mega.rollout.recorder import step_path, trainer_path, write_step
from torl_mega.types import (
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

MODEL = Path(__file__).parents[2] / "conf/quickstart"
CODE = "Let me see.\n```python\ndef f(x):\n    return x ** 2  # squared\nprint(f(%d))\n```\n```output\n"
SAID = "\n%s\n```\n"
ANSWER = "So with $x^2 = %d$ it is \\boxed{%s}.<|endoftext|>"
STATUSES = (ExecutionStatus.OK, ExecutionStatus.ERROR, ExecutionStatus.TIMEOUT_WALL)


@dataclasses.dataclass
class Maker:
    """Makes groups, the same for a seed."""

    tokenizer: Tokenizer
    rng: random.Random

    def turn(self, text: str, step: int, call: ToolCall | None = None) -> Turn:
        ids = self.tokenizer.encode(text)
        logprobs = tuple(float(np.float32(-self.rng.expovariate(1.5))) for _ in ids)
        said = self.tokenizer.encode(call.observation) if call else ()
        return Turn(ids, logprobs, (step,) * len(ids), text, call, said)

    def attempt(self, prompt: Prompt, index: int, step: int, *, right: bool) -> tuple[Trajectory, Reward]:
        gold = prompt.problem.answer
        answer = gold if right else str(int(gold) + index + 1)
        turns: list[Turn] = []
        times = [1_700_000_000 + 60 * step + self.rng.random(), self.rng.random()]
        if index % 4 != 3:
            status = STATUSES[0] if right or index % 2 else self.rng.choice(STATUSES[1:])
            said = SAID % (answer if status is STATUSES[0] else "Error")
            call = ToolCall(
                (CODE % index).split("```python\n")[1], status, 0 if status is STATUSES[0] else 1, said, 0.02
            )
            turns.append(self.turn(CODE % index, step, call))
            times += [0.05, self.rng.random()]
        turns.append(self.turn(ANSWER % (index, answer), max(step - index % 2, 0)))
        ended = StopReason.EOS if index % 5 else StopReason.LENGTH
        trajectory = Trajectory(prompt, index, tuple(turns), ended, (*times, 0.0, 0.01))
        value = 1.0 if right else -1.0
        return trajectory, Reward(value, right, GraderStatus.OK, answer, {"answer": value})

    def group(self, number: int, step: int, size: int, num_right: int) -> Group:
        problem = Problem(f"sums/{number}", f"What is ${number}^2$ plus one?", str(number * number + 1), "sums")
        prompt = Prompt(problem, self.tokenizer.encode(problem.problem))
        scored = [self.attempt(prompt, i, step, right=i < num_right) for i in range(size)]
        return Group(prompt, tuple(t for t, _ in scored), tuple(r for _, r in scored))


def advantages(groups: Sequence[Group]) -> list[float]:
    """Reward less the group's mean, over its deviation."""
    found: list[float] = []
    for group in groups:
        rewards = np.array([r.value for r in group.rewards])
        found += list((rewards - rewards.mean()) / (rewards.std() + 1e-6))
    return found


def make_run(
    folder: Path, *, steps: int = 3, problems: int = 6, size: int = 8, seed: int = 0, scores: bool = True
) -> Path:
    """A run with its steps, one evaluation and metrics. Of the groups, the first is solved, the second failed, the others mixed."""
    maker = Maker(Tokenizer(MODEL), random.Random(seed))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"model": {"path": str(MODEL)}}}))
    for step in range(steps):
        rights = [size, 0, *(1 + (step + n + seed) % (size - 1) for n in range(problems - 2))]
        add_step(folder, step, [maker.group(n, step, size, right) for n, right in enumerate(rights)], scores=scores)
    add_evaluation(folder, "step_00000", [maker.group(n, 0, 1, n % 2) for n in range(5)])
    return folder


def add_step(folder: Path, step: int, groups: Sequence[Group], *, scores: bool = True) -> None:
    write_step(folder / "trajectories", step, groups, advantages(groups))
    if scores:
        sampled = np.concatenate([t.logprobs for g in groups for a in g.trajectories for t in a.turns]).astype(
            np.float32
        )
        path = trainer_path(step_path(folder / "trajectories", step))
        np.savez(path, logprobs=sampled - np.float32(0.05), entropy=np.full(len(sampled), 0.75, np.float16))
    with (folder / "metrics.jsonl").open("a") as out:
        row = {"kind": "train", "step": step, "rollout_s": 2.0, "train_s": 1.0, "sync_s": 0.2, "step_s": 3.2}
        out.write(json.dumps(row) + "\n")


def add_evaluation(folder: Path, name: str, groups: Sequence[Group]) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    with (folder / "eval" / f"{name}.jsonl").open("w") as out:
        for group in groups:
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
                out.write(json.dumps(transcript(trajectory, reward)) + "\n")
