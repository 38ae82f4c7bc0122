"""Predicted time of each phase of a step: FLOPs and bytes over peaks times the efficiencies in `hardware.Assumptions`.

These are estimates: no figure was measured by this project on a GPU. docs/cluster.md compares them with published runs.

Rollout model: all trajectories start at once; the fraction still running at response position t is (1 - t/M)^k with M
the limit and k = M/mean - 1, so the mean is right and the longest reaches the limit, as a batch of thousands does. A decode
step costs a fixed overhead plus the larger of its bytes (weights and KV) and its FLOPs. Tool calls only delay their own
trajectory. Limits: no straggler effects, evaluation and checkpoints not included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torl_mega.config import Config
from torl_mega.layout import ModelShape
from torl_mega.planner.hardware import Assumptions, Gpu
from torl_mega.planner.memory import ServerMemory, dtype_bytes, num_micro_batches, server_weight_bytes

_POINTS = 96  # of the integral over response positions


@dataclass(frozen=True, slots=True)
class Workload:
    """What one step asks for. Tokens per trajectory are means."""

    samples: int
    prompt_tokens: float
    response_tokens: float
    max_response: int
    tool_calls: int

    @property
    def tokens(self) -> float:
        return self.samples * (self.prompt_tokens + self.response_tokens)

    @property
    def mean_tokens(self) -> float:
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, slots=True)
class Setup:
    """What a step's time depends on beside its work: model, settings, hardware and how much of it there is."""

    shape: ModelShape
    config: Config
    gpu: Gpu
    assume: Assumptions
    num_ranks: int  # trainer GPUs
    num_servers: int
    num_nodes: int

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return max(1, self.num_ranks // self.config.parallel.model_size)

    @property
    def link(self) -> float:
        """Bandwidth between trainer ranks in bytes/s, as large collectives reach it."""
        return (self.gpu.network if self.num_nodes > 1 else self.gpu.nvlink) * self.assume.collective


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds per phase of one RL step; `step_s` knows whether rollouts overlap training."""

    rollout_s: float
    logprob_s: float
    train_s: float
    optimizer_s: float
    sync_s: float
    host_s: float
    step_s: float
    concurrency: int  # trajectories decoded together on one server


def workload(config: Config, assume: Assumptions, mean_response: int | None) -> Workload:
    """The config's step. `mean_response` is in tokens; None assumes a fraction of the limit."""
    limit = config.rollout.max_response_tokens
    return Workload(
        samples=config.rollout.prompts_per_step * config.rollout.group_size,
        prompt_tokens=0.4 * config.data.max_prompt_tokens,
        response_tokens=min(limit, mean_response or assume.mean_fraction * limit),
        max_response=limit,
        tool_calls=config.rollout.max_tool_calls,
    )


def predict(setup: Setup, server: ServerMemory, work: Workload) -> StepTime:
    """Times of a step of `work`; `server` says how many trajectories fit into a server's KV cache."""
    shape, config, gpu, assume = setup.shape, setup.config, setup.gpu, setup.assume
    parallel, ranks = config.parallel, setup.num_ranks
    concurrency = _concurrency(setup, server, work)
    rollout = _rollout_s(setup, work, concurrency)
    peak = gpu.bf16 * (1 - assume.tp_loss) ** (parallel.tensor.bit_length() - 1)
    forward = shape.forward_flops(work.tokens, work.mean_tokens)
    passes = config.needs_old_logprobs + (config.algo.kl_coef > 0)
    micro = num_micro_batches(config, setup.data, work.mean_tokens)
    bubble = 1 + (parallel.pipeline - 1) / (parallel.virtual_pipeline * micro)
    gain = assume.fp8_gain if config.trainer.precision != "default" else 1.0
    gain *= assume.moe if shape.experts else 1.0
    factor = 4 if config.trainer.recompute == "full" else 3  # backward is twice forward, and recomputation once more
    exchange = _exchange_s(setup, work)
    logprob = passes * bubble * (forward / (ranks * peak * assume.forward_mfu * gain) + exchange)
    # backward sends back what forward sent
    train = bubble * (factor * forward / (ranks * peak * assume.train_mfu * gain) + (factor - 1) * exchange)
    optimizer = _optimizer_s(setup)
    # once through the trainer's ranks to rank 0, once from there to the servers
    sync = 2 * shape.num_parameters * dtype_bytes(config) / setup.link + assume.sync_fixed_s
    host = work.samples * assume.host_per_sample_s
    learn = logprob + train + optimizer + host
    overlapped = config.cluster.placement == "disaggregated" and config.rollout.max_staleness > 0
    step = (max(rollout, learn) if overlapped else rollout + learn) + sync
    return StepTime(rollout, logprob, train, optimizer, sync, host, step, concurrency)


def _exchange_s(setup: Setup, work: Workload) -> float:
    """Of one forward pass: each token to its experts on other ranks and back, in every layer, nothing overlapped."""
    shape, parallel, experts = setup.shape, setup.config.parallel, setup.shape.experts
    if experts is None or parallel.expert == 1:
        return 0.0
    away = 1 - 1 / parallel.expert
    per_token = 2 * shape.num_layers * experts.top_k * shape.hidden * dtype_bytes(setup.config) * away
    in_node = parallel.expert * parallel.expert_tensor <= max(1, setup.num_ranks // setup.num_nodes)
    bandwidth = (setup.gpu.nvlink if in_node else setup.gpu.network) * setup.assume.collective
    return work.tokens / setup.num_ranks * per_token / bandwidth


def _concurrency(setup: Setup, server: ServerMemory, work: Workload) -> int:
    wanted = -(-work.samples // max(1, setup.num_servers))
    fitting = int(server.kv_tokens / work.mean_tokens)
    limits = [wanted, fitting, setup.config.serving.max_running_requests or wanted]
    return max(1, min(limits))


def _decode_step_s(setup: Setup) -> Callable[[float, float], float]:
    """Of (active, context): one token for each of `active` sequences with `context` tokens behind them."""
    shape, gpu, assume = setup.shape, setup.gpu, setup.assume
    tp, width = setup.config.serving.tensor, dtype_bytes(setup.config)
    per_token = shape.kv_bytes_per_token(width) / min(tp, shape.num_kv_groups)
    weights, bandwidth = server_weight_bytes(shape, setup.config) / tp, gpu.hbm * assume.decode_bandwidth
    of_experts = weights * shape.num_layers * shape.expert_matrices / shape.num_parameters
    # share of experts that one token leaves out
    missed = 1 - shape.experts.top_k / shape.experts.count if shape.experts else 0.0
    flops = tp * gpu.bf16 * assume.prefill_mfu
    reduce = 0.0 if tp == 1 else 2 * shape.num_layers * 15e-6  # two all-reduces per layer, latency-bound

    def seconds(active: float, context: float) -> float:
        read = (weights - of_experts * missed**active + active * context * per_token) / bandwidth
        return assume.decode_overhead_s + max(read, shape.forward_flops(active, context) / flops) + reduce

    return seconds


def _rollout_s(setup: Setup, work: Workload, concurrency: int) -> float:
    """All trajectories of a step: full batches while there are more than fit, then the thinning tail."""
    config, assume, servers = setup.config, setup.assume, setup.num_servers
    limit, mean = work.max_response, work.response_tokens
    power = max(0.0, limit / mean - 1)
    decode_step_s = _decode_step_s(setup)
    tail = 0.0
    for i in range(_POINTS):
        position = (i + 0.5) / _POINTS
        active = concurrency * (1 - position) ** power
        context = work.prompt_tokens + position * limit
        tail += decode_step_s(max(active, 1.0), context) * limit / _POINTS
    waiting = max(0.0, work.samples / max(1, servers) - concurrency)
    full = decode_step_s(concurrency, work.mean_tokens)
    prefill = setup.shape.forward_flops(work.samples / servers * work.prompt_tokens, work.prompt_tokens)
    # a group's prompt is computed once and found in the prefix cache by its other samples
    prefill /= config.serving.tensor * setup.gpu.bf16 * assume.prefill_mfu * config.rollout.group_size
    return tail + waiting * mean / concurrency * full + prefill + work.tool_calls * assume.tool_call_s


def _optimizer_s(setup: Setup) -> float:
    """Gradient reduction, Adam and parameter gathering of all optimizer steps of one RL step."""
    config, assume = setup.config, setup.assume
    steps = config.updates_per_step
    parallel = config.parallel
    params = setup.shape.num_parameters / (parallel.tensor * parallel.pipeline)
    stepped = params / setup.data
    if setup.shape.experts is not None:  # experts have copies of their own number
        experts = setup.shape.stage_expert_parameters(parallel)
        rest = setup.shape.num_parameters - setup.shape.num_layers * setup.shape.expert_matrices
        params = experts + rest / (parallel.tensor * parallel.pipeline)
        stepped = setup.shape.num_parameters / setup.num_ranks
    wire = params * (4 + dtype_bytes(config)) / setup.link if setup.data > 1 else 0.0
    exposed = 0.3 if config.trainer.overlap else 1.0
    adam = stepped * 30 / (setup.gpu.hbm * assume.decode_bandwidth)  # bytes read and written per parameter
    if config.trainer.optimizer_offload:
        adam += stepped * 24 / 20e9  # both ways over PCIe
    return steps * (wire * exposed + adam)
