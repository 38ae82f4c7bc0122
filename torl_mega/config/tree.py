"""The whole tree, and what its sections must agree on."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, PositiveInt, model_validator

from torl_mega.config.cluster import ClusterConfig
from torl_mega.config.data import DataConfig, ModelConfig
from torl_mega.config.objective import AlgoConfig, OptimConfig, RewardConfig
from torl_mega.config.rollout import RolloutConfig, SandboxConfig, ServingConfig
from torl_mega.config.section import Section
from torl_mega.config.training import CheckpointConfig, ParallelConfig, PretrainConfig, TrainerConfig
from torl_mega.config.watching import EvalConfig, GuardsConfig, LoggingConfig


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Run folder below `runs_dir`; a run of the same name is resumed."""
    runs_dir: str = "runs"
    """Folder of all runs; of several nodes one that all of them see."""
    seed: int = Field(default=0, ge=0)
    """Of data order, sampling seeds and initialisation."""
    num_steps: PositiveInt
    """RL steps of the whole run. Source: axes of the paper's figures 1, 4 and 5, about 1,000 for 1.5B and 500 for 7B. Differs:
    the script has no limit (300 epochs of 224 steps)."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    sandbox: SandboxConfig = SandboxConfig()
    serving: ServingConfig = ServingConfig()
    reward: RewardConfig
    algo: AlgoConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    trainer: TrainerConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    pretrain: PretrainConfig | None = None
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per RL step; of `torl pretrain` a step is one."""
        if self.pretrain is not None:
            return 1
        return self.rollout.prompts_per_step * self.rollout.group_size // self.trainer.mini_batch_samples

    @property
    def needs_old_logprobs(self) -> bool:
        """False where leaving the old-log-prob pass out was asked for and changes nothing."""
        algo = self.algo
        on_policy = self.updates_per_step == 1 and self.rollout.max_staleness == 0
        charged = algo.kl_coef > 0 and algo.kl_in == "reward"
        corrected = algo.correction != "none" or algo.correction_veto is not None
        return algo.old_logprobs == "always" or charged or corrected or not on_policy or algo.router_replay == "old"

    @property
    def max_train_tokens(self) -> int:
        """Longest sequence that is trained on."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def max_context_tokens(self) -> int:
        """Longest sequence the servers ever see: a training or an evaluation prompt, and its response."""
        evaluated = self.eval.max_prompt_tokens if self.eval.data else None
        return max(self.data.max_prompt_tokens, evaluated or 0) + self.rollout.max_response_tokens

    @model_validator(mode="before")
    @classmethod
    def _correct_stale_samples(cls, raw: Any) -> Any:
        """Uncorrected, samples that are one version old keep the quickstart from learning (docs/algorithms.md)."""
        algo, rollout = (raw.get(name) for name in ("algo", "rollout")) if isinstance(raw, dict) else (None, None)
        if not isinstance(algo, dict) or not isinstance(rollout, dict) or "correction" in algo:
            return raw
        return {**raw, "algo": {**algo, "correction": "tis" if rollout.get("max_staleness") else "none"}}

    @model_validator(mode="after")
    def _servers_tell_the_experts(self) -> Self:
        if self.algo.router_replay != "rollout":
            return self
        if self.serving.router is not None:
            raise ValueError(
                "algo.router_replay = rollout cannot go through serving.router: sglang-router drops the request for the experts; "
                "take serving.router = null, or router_replay = old"
            )
        if self.rollout.max_staleness > 1 and self.rollout.pause == "retract":
            raise ValueError(
                "algo.router_replay = rollout with rollout.max_staleness > 1 needs rollout.pause = in_place: an attempt that is "
                "retracted keeps its log-probs, but SGLang tells the experts of its second time through the model"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rollout.protocol == "chat" and self.data.template != "chat":
            raise ValueError(
                "rollout.protocol = chat needs data.template = chat; calls are written as the chat template has them"
            )
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        if self.trainer.mini_batch_samples > samples:
            raise ValueError(
                f"trainer.mini_batch_samples = {self.trainer.mini_batch_samples} is more than a step collects "
                f"({self.rollout.prompts_per_step} prompts x {self.rollout.group_size}); take at most {samples}"
            )
        if samples % self.trainer.mini_batch_samples:
            raise ValueError(
                f"trainer.mini_batch_samples = {self.trainer.mini_batch_samples} does not divide the {samples} samples of a step"
            )
        if self.trainer.micro_batch_tokens < self.max_train_tokens:
            raise ValueError(
                f"trainer.micro_batch_tokens = {self.trainer.micro_batch_tokens} cannot hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_response_tokens = {self.max_train_tokens} tokens"
            )
        if self.serving.weight_dtype == "fp8_block" and self.model.dtype != "bfloat16":
            raise ValueError(f"serving.weight_dtype = fp8_block needs model.dtype = bfloat16, found {self.model.dtype}")
        if self.serving.weight_dtype == "fp8_block" and self.serving.transport == "disk":
            raise ValueError(
                "serving.weight_dtype = fp8_block cannot be verified after serving.transport = disk, where SGLang lays FP8 "
                "weights out anew while loading; take broadcast or handles"
            )
        if self.trainer.optimizer_offload and not (
            self.model.dtype == "bfloat16" and self.trainer.distributed_optimizer
        ):
            # megatron-core 0.16.1 and 0.19.2 fail otherwise, in the first step or while building the optimizer
            raise ValueError(
                f"trainer.optimizer_offload needs model.dtype = bfloat16 and trainer.distributed_optimizer = true, found "
                f"{self.model.dtype} and {str(self.trainer.distributed_optimizer).lower()}"
            )
        if self.trainer.layer_spec == "local" and self.trainer.precision != "default":
            raise ValueError(
                f"trainer.precision = {self.trainer.precision} is Transformer Engine's; leave trainer.layer_spec = local out"
            )
        if self.rollout.max_staleness and not self.logging.trajectories:
            raise ValueError(
                "rollout.max_staleness > 0 needs logging.trajectories: a resumed run reads collected steps back"
            )
        if self.rollout.attempts_per_prompt and self.rollout.attempts_per_prompt < self.rollout.group_size:
            raise ValueError(
                f"rollout.attempts_per_prompt = {self.rollout.attempts_per_prompt} is fewer than the "
                f"rollout.group_size = {self.rollout.group_size} that are kept of them"
            )
        if self.algo.ref_every_steps and not self.algo.kl_coef:
            raise ValueError("algo.ref_every_steps moves the reference of the KL; it needs algo.kl_coef above 0")
        if self.parallel.sequence and self.parallel.tensor == 1:
            raise ValueError("parallel.sequence = true needs parallel.tensor > 1")
        if self.parallel.virtual_pipeline > 1 and self.parallel.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1")
        return self

    @model_validator(mode="after")
    def _turns_fit(self) -> Self:
        if self.cluster.turns == "always" and self.rollout.max_staleness:
            raise ValueError(
                f"cluster.turns = always needs rollout.max_staleness = 0, found {self.rollout.max_staleness}: servers sample all "
                "the time; take cluster.turns = never or cluster.placement = disaggregated"
            )
        if self.cluster.turns == "always" and self.serving.urls:
            raise ValueError("cluster.turns = always needs servers that the run itself starts; leave serving.urls out")
        if self.trainer.park_weights and (
            self.cluster.turns == "never" or self.cluster.placement == "disaggregated" or self.rollout.max_staleness
        ):
            raise ValueError(
                "trainer.park_weights needs ranks and servers that take turns: cluster.placement = colocated, cluster.turns = auto "
                "or always, rollout.max_staleness = 0"
            )
        return self
