"""The whole RL step a second time: recorded trajectories in, weights after three steps out, in plain `transformers` and torch.

One sequence at a time, fp32, no packing; the formulas are those of `slow_algo` and autograd's. Nothing of torl_mega.algo, of
make_samples or of the trainer is used here, only their records and the config's numbers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_reference as ref
import slow_algo

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

RL_STEPS = 3
PROMPTS, GROUP = 4, 4
TWO_UPDATES = "trainer.mini_batch_samples=8"
CASES: dict[str, list[str]] = {
    "paper": [],
    "two updates": [TWO_UPDATES],
    "the pass left out": ["algo.old_logprobs=when_needed"],
    "dual clip, masked answers": [TWO_UPDATES, "algo.dual_clip=1.05", "algo.mask_truncated=true", "rollout.temperature=1.3"],
    "gspo": [TWO_UPDATES, "algo.loss=gspo", "algo.loss_agg=seq_mean_token_mean", "algo.clip_low=0.01", "algo.clip_high=0.01"],
    "cispo": [TWO_UPDATES, "algo.loss=cispo", "algo.loss_agg=prompt_mean", "algo.clip_low=1.0"],
    "dr grpo": ["algo.advantage=dr_grpo", "algo.loss_agg=seq_mean_token_sum_norm"],
    "kl in the loss": ["algo.kl_coef=0.1", "algo.kl_estimator=k2", "algo.entropy_coef=0.01", "optim.warmup_steps=2"],
    "k3 against a moving reference": ["algo.kl_coef=0.1", "algo.ref_every_steps=2", "optim.schedule=cosine"],
    "kl in the reward": ["algo.kl_coef=0.05", "algo.kl_in=reward", "algo.kl_estimator=k1", "algo.advantage=rloo"],
    "tis": ["algo.correction=tis", "algo.correction_high=1.1"],
    "geo and tis with a veto": ["algo.correction=geo_tis", "algo.correction_geo=[0.95,1.05]", "algo.correction_veto=0.5"],
    "mis": ["algo.correction=mis", "algo.advantage=reinforce_pp", "optim.schedule=linear"],
    "signal only": [TWO_UPDATES, "algo.zero_signal=drop", "algo.advantage=batch_std"],
    "observations too": [TWO_UPDATES, "algo.train_on_observations=true"],
    "penalties on advantages": ["algo.penalties=advantage", "algo.penalty_bound=0.3"],
}  # fmt: skip


def overrides(case: str) -> list[str]:
    """Of the quickstart, on top of `layout_worker.config_for`."""
    sizes = [f"rollout.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}", "trainer.mini_batch_samples=16"]
    return [*sizes, f"num_steps={RL_STEPS}", "algo.entropy_coef=0", *CASES[case]]


def record(step: int, start: Any, temperature: float) -> tuple[Group, ...]:
    """The trajectories of one step: one to three turns with observations between, log-probs of the starting model with a
    server's noise, one group without signal, some penalties, some cut off."""
    rng = np.random.default_rng(100 + step)
    groups = []
    for g in range(PROMPTS):
        prompt = Prompt(Problem(f"p/{step}/{g}", "1+1", "2", "p"), tuple(rng.integers(0, ref.VOCAB, 3 + g).tolist()))
        trajectories, rewards = [], []
        for i in range(GROUP):
            bare = _attempt(rng, prompt, i)
            trajectories.append(_with_logprobs(rng, bare, start, temperature))
            correct = bool(rng.random() < 0.5) if g else True
            penalty = float(rng.choice([0.0, -0.05, -0.4])) if g else 0.0
            parts = {"answer": 1.0 if correct else -1.0, "tool_cost": penalty}
            rewards.append(Reward(sum(parts.values()), correct, GraderStatus.OK, "2", parts))
        groups.append(Group(prompt, tuple(trajectories), tuple(rewards)))
    return tuple(groups)


def _attempt(rng: np.random.Generator, prompt: Prompt, index: int) -> Trajectory:
    turns, num_turns = [], int(rng.integers(1, 4))
    for n in range(num_turns):
        count = int(rng.integers(1, 9))
        last = n == num_turns - 1
        call = None if last else ToolCall("1", ExecutionStatus.OK, 0, "", 0.0)
        seen = () if last else tuple(rng.integers(0, ref.VOCAB, int(rng.integers(1, 4))).tolist())
        ids = tuple(rng.integers(0, ref.VOCAB, count).tolist())
        turns.append(Turn(ids, (0.0,) * count, (0,) * count, "", call, seen))
    return Trajectory(prompt, index, tuple(turns), StopReason.LENGTH if rng.random() < 0.2 else StopReason.EOS)


def _with_logprobs(rng: np.random.Generator, bare: Trajectory, start: Any, temperature: float) -> Trajectory:
    scored = score(start, Sequence_.of(bare, observations=False), temperature)[0].detach().numpy()
    turns, at = [], len(bare.prompt.token_ids)
    for turn in bare.turns:
        n = len(turn.token_ids)
        noisy = scored[at : at + n] + rng.normal(0, 0.1, n).astype(np.float32)
        turns.append(
            Turn(
                turn.token_ids, tuple(map(float, noisy)), turn.policy_versions, "", turn.tool_call, turn.observation_ids
            )
        )
        at += n + len(turn.observation_ids)
    return Trajectory(bare.prompt, bare.sample_index, tuple(turns), bare.stop_reason)


@dataclass
class Sequence_:
    """One trajectory as the reference sees it."""

    ids: list[int]
    trained: list[int]  # positions of sampled tokens, with algo.train_on_observations of a tool's too
    rollout: list[float]  # log-probs of those
    group: int = 0
    advantage: float = 0.0
    old: list[float] = field(default_factory=list)
    ref: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, trajectory: Trajectory, *, observations: bool) -> Sequence_:
        ids, trained, rollout = list(trajectory.prompt.token_ids), [], []
        for turn in trajectory.turns:
            trained += range(len(ids), len(ids) + len(turn.token_ids))
            rollout += turn.logprobs
            if observations:
                trained += range(trained[-1] + 1, trained[-1] + 1 + len(turn.observation_ids))
                rollout += [0.0] * len(turn.observation_ids)
            ids += [*turn.token_ids, *turn.observation_ids]
        return cls(ids, trained, rollout)


def score(model: Any, sequence: Sequence_, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy at every position; position 0 has none."""
    ids = torch.tensor(sequence.ids)
    table = torch.log_softmax(model(ids[None]).logits[0, :-1].float() / temperature, -1)
    chosen, entropy = table.gather(-1, ids[1:, None])[:, 0], -(table.exp() * table).sum(-1)
    zero = torch.zeros(1)
    return torch.cat([zero, chosen]), torch.cat([zero, entropy])


class StepReference:
    """Runs `config` on recorded steps; `weights` and `norms` are the outcome."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        self.reference = copy.deepcopy(model)
        optim = config.optim
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.updates = 0
        self.norms: list[float] = []

    def step(self, number: int, groups: Sequence[Group]) -> None:
        config, algo = self.config, self.config.algo
        if algo.ref_every_steps and number and number % algo.ref_every_steps == 0:
            self.reference = copy.deepcopy(self.model)
        batch = self._batch(groups)
        with torch.no_grad():
            for s in batch:
                s.old = score(self.model, s, config.rollout.temperature)[0][s.trained].tolist()
                s.ref = score(self.reference, s, config.rollout.temperature)[0][s.trained].tolist()
        if algo.kl_coef and algo.kl_in == "reward":
            self._charge(batch, groups)
        size = config.trainer.mini_batch_samples
        for first in range(0, len(batch), size):
            self._update(batch[first : first + size])

    def _batch(self, groups: Sequence[Group]) -> list[Sequence_]:
        algo, batch = self.config.algo, []
        on_advantage = algo.penalties == "advantage"
        rewards = [[r.parts["answer"] if on_advantage else r.value for r in g.rewards] for g in groups]
        for number, (group, row) in enumerate(zip(groups, slow_algo.advantages(rewards, algo.advantage), strict=True)):
            for trajectory, reward, advantage in zip(group.trajectories, group.rewards, row, strict=True):
                s = Sequence_.of(trajectory, observations=algo.train_on_observations)
                penalty = reward.value - reward.parts["answer"] if on_advantage else 0.0
                s.group, s.advantage = number, advantage + max(penalty, -algo.penalty_bound * abs(advantage))
                cut_off = algo.mask_truncated and trajectory.stop_reason is StopReason.LENGTH
                if cut_off or (algo.zero_signal == "drop" and not any(row)):
                    s.trained, s.rollout = [], []
                batch.append(s)
        return batch

    def _charge(self, batch: list[Sequence_], groups: Sequence[Group]) -> None:
        algo, at, rewards = self.config.algo, 0, []
        for group in groups:
            row = []
            for reward in group.rewards:
                s = batch[at]
                cost = sum(slow_algo.kl(b - a, algo.kl_estimator) for a, b in zip(s.old, s.ref, strict=True))
                row.append(reward.value - algo.kl_coef * cost)
                at += 1
            rewards.append(row)
        charged = [a for row in slow_algo.advantages(rewards, algo.advantage) for a in row]
        for s, advantage in zip(batch, charged, strict=True):
            s.advantage = advantage

    def _update(self, mini: list[Sequence_]) -> None:
        config, algo = self.config, self.config.algo
        counts = slow_algo.aggregation(
            [len(s.trained) for s in mini],
            [s.group for s in mini],
            algo.loss_agg,
            config.rollout.max_response_tokens,
        )
        self.optimizer.zero_grad()
        for s, count in zip(mini, counts, strict=True):
            if not s.trained:
                continue
            logprobs, entropies = score(self.model, s, config.rollout.temperature)
            now, entropy = logprobs[s.trained], entropies[s.trained]
            factors = slow_algo.correction([a - b for a, b in zip(s.old, s.rollout, strict=True)], algo)
            terms = self._surrogate(now, torch.tensor(s.old), s.advantage) - algo.entropy_coef * entropy
            if algo.kl_coef and algo.kl_in == "loss":
                gap = torch.tensor(s.ref) - now
                terms = terms + algo.kl_coef * slow_algo.kl(gap, algo.kl_estimator, torch.exp)
            (count * torch.tensor(factors) * terms).sum().backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip_grad)
        self.norms.append(float(norm))
        self.optimizer.step()
        self.updates += 1

    def _surrogate(self, now: torch.Tensor, old: torch.Tensor, advantage: float) -> torch.Tensor:
        algo, ratio = self.config.algo, (now - old).exp()
        low, high = 1 - algo.clip_low, 1 + algo.clip_high
        if algo.loss == "cispo":
            return -advantage * ratio.detach().clamp(low, high) * now
        if algo.loss == "gspo":  # one ratio for the sequence, with its own gradient
            ratio = (now - old).mean().exp().expand_as(now)
        term = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
        if algo.dual_clip and advantage < 0:
            term = torch.minimum(term, torch.full_like(term, -advantage * algo.dual_clip))
        return term

    def _lr(self) -> float:
        optim, n = self.config.optim, self.updates
        total, warm = (
            self.config.num_steps * (PROMPTS * GROUP // self.config.trainer.mini_batch_samples),
            optim.warmup_steps,
        )
        if n <= warm:
            return optim.lr * (n + 1) / (warm + 1)
        done = (n - warm) / (total - warm)
        return (
            optim.lr
            * {
                "constant": 1.0,
                "linear": 1 - done,
                "cosine": 0.5 * (1 + np.cos(np.pi * done)),
            }[optim.schedule]
        )
