"""Makes a recorded run to train on without servers: made-up answers to the quickstart's problems, in the run's format.

What the policy is trained on does not matter to the launch tests; that two runs train on exactly the same does.
"""

from __future__ import annotations

import random
from pathlib import Path

from torl_mega.config import Config
from torl_mega.data.prompts import PromptSource, plain_prompts
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.rollout.recorder import write_step
from torl_mega.types import GraderStatus, Group, Prompt, Reward, StopReason, Trajectory, Turn


def make_recording(config: Config, folder: Path, *, num_steps: int) -> Path:
    """Writes `folder`/trajectories with `num_steps` steps of `config`'s size; returns `folder`."""
    tokenizer = Tokenizer(config.model.path)
    source = PromptSource(config.data, plain_prompts(config.data.template, tokenizer.encode), seed=config.seed)
    rng = random.Random(0)
    for step in range(num_steps):
        groups = [
            _group(prompt, config.rollout.group_size, tokenizer, rng)
            for prompt in source.next(config.rollout.prompts_per_step)
        ]
        write_step(folder / "trajectories", step, groups, [0.0] * sum(len(g.trajectories) for g in groups))
    return folder


def _group(prompt: Prompt, size: int, tokenizer: Tokenizer, rng: random.Random) -> Group:
    trajectories, rewards = [], []
    for index in range(size):
        text = f" {rng.randint(0, 999)} \\boxed{{{rng.randint(0, 99)}}}"
        ids = (*tokenizer.encode(text), tokenizer.eos_id)
        turn = Turn(ids, tuple(-rng.random() for _ in ids), (0,) * len(ids), text)
        trajectories.append(Trajectory(prompt, index, (turn,), StopReason.EOS))
        correct = index % 2 == 0
        value = 1.0 if correct else -1.0
        rewards.append(Reward(value, correct, GraderStatus.OK, "1", {"answer": value}))
    return Group(prompt, tuple(trajectories), tuple(rewards))
