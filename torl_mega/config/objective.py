"""What is learned: rewards, the algorithm, the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from torl_mega.config.section import Section
from torl_mega.import_path import is_import_path

Beta = Annotated[float, Field(ge=0, lt=1)]
SHAPING = ("code_error", "overlong", "tool_cost", "format_error")  # names of the reward's summands besides the answer's
AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "batch_std", "reinforce_pp"]


class RewardConfig(Section):
    correct: float
    """Reward of a correct answer. Source: paper §2.3, math_verifier.py:60."""
    wrong: float
    """Reward of a wrong or missing answer. Source: paper §2.3, math_verifier.py:66. Differs: the box must stand in prose
    that the policy wrote; the release also reads boxes in observations and programs."""
    code_error: float = Field(default=0.0, le=0)
    """Added when a program of the trajectory did not run. Source: paper §2.3 has -0.5 as an option, §3.1 leaves it off.
    Differs: the release also fines answers without a call (naive.py:72)."""
    overlong: float = Field(default=0.0, le=0)
    """Added to a response that uses up its token budget, growing from 0 over the buffer before it (DAPO, 2503.14476); 0 = off."""
    overlong_buffer_tokens: PositiveInt = 512
    """Tokens before rollout.max_response_tokens over which `overlong` grows."""
    tool_cost: float = Field(default=0.0, le=0)
    """Added for every program that ran; 0 = off."""
    tool_cost_floor: float = Field(default=-0.5, le=0)
    """What `tool_cost` comes to at most, however many programs ran."""
    format_error: float = Field(default=0.0, le=0)
    """Added to a response without a final box; 0 = off."""
    function: str | None = None
    """A function of your own instead of the comparison of answers, `pkg.module:name` (docs/own.md): called in a killable process
    within grader_timeout_s; the shaping options are added to it."""
    checker: Literal["own", "math_verify"] = "own"
    """Who compares answers: this project's grader, or math-verify with its defaults as the paper's reward does."""
    grader_timeout_s: PositiveFloat = 5.0
    """Limit of one answer check; past it the answer is wrong and counted as `grader_timeout`."""
    grader_workers: PositiveInt = 2
    """Killable grader processes that check at once; hanging ones are set aside and do not take a place."""
    grader_memory_mb: PositiveInt = 1024
    """Address space one check may add to the interpreter's own."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.function is not None and not is_import_path(self.function):
            raise ValueError(f"reward.function = {self.function!r} is not of the form pkg.module:name")
        if self.correct <= self.wrong:
            raise ValueError(f"reward.correct = {self.correct} is not above reward.wrong = {self.wrong}")
        penalties = [self.code_error, self.overlong, self.tool_cost and self.tool_cost_floor, self.format_error]
        if self.correct + sum(penalties) <= (self.correct + self.wrong) / 2:
            active = ", ".join(f"{n} {p}" for n, p in zip(SHAPING, penalties, strict=True) if p)
            raise ValueError(
                f"reward penalties ({active}) together bring a correct answer ({self.correct}) down to the middle between "
                f"correct and wrong or below; their sum must stay above {(self.wrong - self.correct) / 2}"
            )
        return self


class AlgoConfig(Section):
    advantage: AdvantageKind
    """(reward - baseline) / scale; docs/algorithms.md has the kinds. Source: paper §3.1, script:19,
    core_algos.py:146-151. Differs: a group of one has advantage 0, not its reward."""
    loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    """PPO's clip per token, GSPO's per sequence, or CISPO's clipped weight that keeps every token's gradient. Source: paper
    §3.1, core_algos.py:299."""
    clip_low: float = Field(gt=0, le=1)
    """Lower side of the ratio clip: 1 - clip_low. Source: ppo_trainer.yaml:35."""
    clip_high: float = Field(gt=0)
    """Upper side: 1 + clip_high (0.28 is DAPO's clip-higher). Source: ppo_trainer.yaml:35."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, most that a token counts, in advantages: bounds ratios far above 1 (1912.09729; verl
    takes 3). Source: none in core_algos.py:299."""
    loss_agg: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "prompt_mean"]
    """Tokens of the mini-batch alike; every sequence alike; sums over a constant length (Dr. GRPO); every prompt alike.
    Source: dp_actor.py:283-312, the token mean of every micro-batch, weighed by sequences. Differs: that depends on packing
    and on the number of GPUs; ours is the token mean of the whole mini-batch."""
    kl_coef: float = Field(ge=0)
    """Weight of the KL to the starting policy. Source: paper §3.1, script:7-8. Differs: at 0 no reference pass is made."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the KL; k3 is clamped at 10. Source: script:33, core_algos.py (low-var k3)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or its sum over the response taken off the reward. Source: script:9,50."""
    ref_every_steps: int = Field(default=0, ge=0)
    """RL steps after which the reference becomes the current policy; 0 = the starting weights for ever."""
    entropy_coef: float = Field(ge=0)
    """Weight of the entropy bonus. Source: script:10."""
    router_replay: Literal["off", "rollout", "old"] = "off"
    """Models with experts: every pass of the trainer takes, token by token, the experts that the server took (R3, 2510.11370), or
    those of the old-log-prob pass (R2, 2507.18071 §5.3). Their weights still come from the trainer's own router."""
    router_aux_coef: float = Field(default=0.0, ge=0)
    """Weight of the loss that makes routers choose all experts alike, per sequence and layer (DeepSeek-V3 2412.19437, 2.1.2). 0 in
    GRPO: it pulls against the reward."""
    correction: Literal["none", "tis", "seq_tis", "mis", "geo", "geo_tis"] = "none"
    """Correction between server and trainer, off- or on-policy: importance sampling truncated per token or sequence, masked
    per token, geometric-mean rejection of sequences, or that with `tis`. Left out, it is `tis` where rollout.max_staleness >
    0."""
    correction_low: float = Field(default=0.5, ge=0)
    """Ratios below it are masked (mis)."""
    correction_high: float = Field(default=2.0, gt=0)
    """Ratios above it are truncated (tis, seq_tis, geo_tis) or masked (mis)."""
    correction_geo: tuple[float, float] | None = None
    """Bounds of the geometric-mean ratio, for geo and geo_tis; None = [0.999, 1.001], as in all of verl's presets: a mean over
    a sequence moves far less than a token."""
    correction_veto: float | None = Field(default=None, gt=0, lt=1)
    """A token with a ratio below it drops its whole sequence; 1e-4 catches what is a fault, no drift."""
    zero_signal: Literal["keep", "drop", "refill"] = "keep"
    """Groups whose advantages are all zero: counted in the mean, left out of it, or replaced by sampling further prompts
    (DAPO's dynamic sampling, which looks at the answers alone), at most rollout.refill_rounds times. Source:
    core_algos.py:146, kept."""
    penalties: Literal["reward", "advantage"] = "reward"
    """Where the reward's penalties act: in the reward, where a group's std may blow them up, or on the advantage, at most
    `penalty_bound` of its size."""
    penalty_bound: float = Field(default=0.5, ge=0, lt=1)
    """Share of an advantage that penalties take at most (ASPO 2508.19201); below 1 no sign flips."""
    old_logprobs: Literal["always", "when_needed"] = "always"
    """`when_needed` leaves the pass out where the ratio is 1 by construction: one update per step on the newest weights,
    without correction and without KL in the reward. Mismatch quantiles are then not logged. Source: ray_trainer.py:990,
    always."""
    void_turns: Literal["keep", "mask"] = "keep"
    """Mask trajectories with a turn that holds neither a complete code block nor an answer (SimpleTIR, 2509.02479)."""
    mask_truncated: bool = False
    """Leave responses that ran out of budget out of the loss (DAPO's overlong filter)."""
    train_on_observations: bool = False
    """Train on what the tools say as on what was sampled: a control of the paper's claim that masking it keeps training stable
    (§2.3.2), not a recipe."""

    @field_validator("router_replay", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        """YAML reads off as false."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.zero_signal == "refill" and self.advantage == "reinforce_pp":
            raise ValueError(
                "algo.zero_signal = refill replaces groups whose answers are alike, but with algo.advantage = reinforce_pp these "
                "have advantages too; use keep or drop, or another advantage"
            )
        if self.train_on_observations and self.old_logprobs == "when_needed":
            raise ValueError(
                "algo.train_on_observations needs algo.old_logprobs = always: no server samples what a tool says, so it has no "
                "log-probs without the pass"
            )
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.correction_low > self.correction_high:
            raise ValueError(
                f"algo.correction_low = {self.correction_low:g} is above algo.correction_high = {self.correction_high:g}; swap them"
            )
        if self.geo_bounds[0] > self.geo_bounds[1]:
            raise ValueError(f"algo.correction_geo = {list(self.geo_bounds)} is not [low, high]; swap them")
        return self

    @property
    def geo_bounds(self) -> tuple[float, float]:
        return self.correction_geo or (0.999, 1.001)


class OptimConfig(Section):
    lr: PositiveFloat
    """Peak learning rate. Source: script:7,28."""
    weight_decay: float = Field(ge=0)
    """On matrices only, as in Megatron. Source: fsdp_workers.py:278. Differs: the release decays biases and norms too, by
    1e-8 of their size an update."""
    betas: tuple[Beta, Beta]
    """Adam's decay rates. Source: fsdp_workers.py:277."""
    eps: PositiveFloat
    """Adam's epsilon. Source: torch.optim.AdamW's default, which fsdp_workers.py:277 leaves."""
    clip_grad: PositiveFloat
    """Global gradient norm. Source: ppo_trainer.yaml:34. Differs: the release's loss is an eighth of the mean on 8 GPUs
    (dp_actor.py:312), so the same number there acts at a norm of 8; Adam cancels the factor."""
    schedule: Literal["constant", "linear", "cosine"]
    """What the learning rate does after the warm-up, over num_steps. Source: ppo_trainer.yaml:45-47, constant."""
    warmup_steps: int = Field(ge=0)
    """Optimizer steps of linear warm-up: update n (from 0) has (n + 1) / (warmup_steps + 1) of `lr`. Source:
    ppo_trainer.yaml:45-47, none."""
