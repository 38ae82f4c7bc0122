"""How a run is looked after: evaluation, limits, logs and trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from torl_mega.config.section import Section


class BenchmarkConfig(Section):
    """How one benchmark is sampled where it differs from the others."""

    samples_per_problem: PositiveInt | None = None
    """None = eval.samples_per_problem."""
    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy; None = eval.temperature."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """None = eval.top_p."""


class EvalConfig(Section):
    data: tuple[str, ...] = ()
    """Benchmarks: paths as in data.train, or `arithmetic:SEED`; empty = no evaluation. A name that is no file stands for a
    benchmark that is not there: it is left out, and every report says so. Source: paper §3.1, five benchmarks. Differs: the
    release's test file holds three of them, with 134 of MATH500's 500 problems."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest templated prompt of a benchmark, in tokens; a longer one counts as wrong. None = data.max_prompt_tokens.
    Source: ppo_trainer.yaml:8. Differs: the release keeps 10 tokens back (ray_trainer.py:526)."""
    max_problems: PositiveInt | None = None
    """First problems of each benchmark; None = all."""
    temperature: float = Field(ge=0)
    """0 = greedy. Source: paper §3.1, ray_trainer.py:648."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus; None = rollout.top_p."""
    benchmarks: dict[str, BenchmarkConfig] = Field(default={})
    """By name (aime24, math500, …): samples_per_problem, temperature and top_p of its own."""
    samples_per_problem: PositiveInt = 1
    """k of avg@k and pass@k. Source: paper §3.1, one greedy attempt."""
    every_steps: int = Field(default=0, ge=0)
    """Also evaluate during training; 0 = only before step 0 and after the last step. Source: script:57."""


class GuardsConfig(Section):
    """Limits above which a step stops the run, and near which it warns; None = log only. Shares in [0, 1], but for the count of
    skipped updates and what is in nats."""

    max_fault_rate: float = Field(default=0.1, ge=0, le=1)
    """Trajectories lost to infrastructure faults."""
    max_logprob_diff: PositiveFloat | None = None
    """Largest |server - trainer| log-prob of any trained token."""
    warn_k3: PositiveFloat = 0.01
    """KL(server || trainer) per token, by k3, above which a step warns. bf16 on both sides gives about 1e-4 to 1e-3."""
    max_skipped_updates: int = Field(default=3, ge=0)
    """Updates in a row that are skipped because their gradient is not a number; one more ends the run."""
    max_void_turn_ratio: float | None = Field(default=None, ge=0, le=1)
    """Trajectories with a turn that holds neither a complete program nor an answer."""
    max_truncated_ratio: float | None = Field(default=None, ge=0, le=1)
    """Trajectories that ran out of their token budget."""
    max_grader_timeout_ratio: float | None = Field(default=0.2, ge=0, le=1)
    """Trajectories whose answer the grader could not judge in time."""
    warn_at: float = Field(default=0.5, gt=0, le=1)
    """Share of each limit above which a warning is logged."""
    probe_logprob_diff: PositiveFloat = 0.5
    """The start-up probe's limit for the same prompt on server and trainer; bf16 rounds, so it is loose by default."""


class WandbConfig(Section):
    """A run at Weights & Biases, beside metrics.jsonl; needs the library wandb."""

    project: str = "torl_mega"
    """Where the run is listed."""
    entity: str | None = None
    """User or team; None = the account's own."""
    group: str | None = None
    """Runs that belong together, such as the seeds of one arm."""
    mode: Literal["online", "offline"] | None = None
    """offline writes RUN/wandb/, for `wandb sync`. None = as WANDB_MODE says, or online."""
    tags: tuple[str, ...] = ()
    """Labels of the run there."""


class MlflowConfig(Section):
    """A run at MLflow, beside metrics.jsonl; needs the library mlflow-skinny or mlflow."""

    uri: str | None = None
    """Tracking server (`http://host:port`) or a folder. None = as MLFLOW_TRACKING_URI says, or the folder `mlruns` in runs_dir."""
    experiment: str = "torl_mega"
    """Where the run is listed."""


class LoggingConfig(Section):
    trajectories: bool = True
    """Write trajectories/step_*.jsonl.zst."""
    tensorboard: bool = True
    """Write tensorboard/."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases; None = not."""
    mlflow: MlflowConfig | None = None
    """Also log to MLflow; None = not."""
    samples: int = Field(default=4, ge=0)
    """Transcripts that the trackers get with each evaluation and every `samples_every_steps` steps."""
    samples_every_steps: PositiveInt = 10
    """Fewer than every step, so that texts do not fill a tracker."""
