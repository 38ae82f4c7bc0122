"""Predicted time of each phase of a step: FLOPs and bytes over peaks times the efficiencies in `hardware.Assumptions`.

These are estimates: no figure was measured by this project on a GPU. docs/cluster.md compares them with published runs.

Rollout model: all trajectories start at once; the share still running at response position t is (1 - t/M)^k with M the
limit and k = M/mean - 1, so the mean is right and the longest reaches the limit, as a batch of thousands does. A decode
step costs a fixed overhead plus the larger of its bytes (weights and KV) and its FLOPs. Tool calls only delay their own
trajectory. Limits: no straggler effects, evaluation and checkpoints not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torl_mega.config import Config
from torl_mega.layout import ModelShape
from torl_mega.planner import shapes
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
    """The config's step. `mean_response` is in tokens; None assumes a share of the limit."""
    limit = config.rollout.max_response_tokens
    return Workload(
        samples=config.rollout.prompts_per_step * config.rollout.group_size,
        prompt_tokens=0.4 * config.data.max_prompt_tokens,
        response_tokens=min(limit, mean_response or assume.mean_share * limit),
        max_response=limit,
        tool_calls=config.rollout.max_tool_calls,
    )


def predict(
    shape: ModelShape,
    config: Config,
    gpu: Gpu,
    server: ServerMemory,
    *,
    ranks: int,
    servers: int,
    nodes: int,
    work: Workload,
    assume: Assumptions,
) -> StepTime:
    """Times of a step on `ranks` trainer GPUs over `nodes` nodes with `servers` servers."""
    parallel = config.parallel
    data = max(1, ranks // parallel.model_size)
    concurrency = _concurrency(config, server, work, servers)
    rollout = _rollout_s(shape, config, gpu, work, servers, concurrency, assume)
    peak = gpu.bf16 * (1 - assume.tp_loss) ** (parallel.tensor.bit_length() - 1)
    forward = shapes.forward_flops(shape, work.tokens, work.mean_tokens)
    passes = config.needs_old_logprobs + (config.algo.kl_coef > 0)
    micro = num_micro_batches(config, data, work.mean_tokens)
    bubble = 1 + (parallel.pipeline - 1) / (parallel.virtual_pipeline * micro)
    gain = assume.fp8_gain if config.trainer.precision != "default" else 1.0
    factor = 4 if config.trainer.recompute == "full" else 3
    logprob = passes * forward * bubble / (ranks * peak * assume.forward_mfu * gain)
    train = factor * forward * bubble / (ranks * peak * assume.train_mfu * gain)
    optimizer = _optimizer_s(shape, config, gpu, data, nodes, assume)
    link = gpu.network if nodes > 1 else gpu.nvlink
    sync = 2 * shape.num_parameters * dtype_bytes(config) / (link * assume.collective) + assume.sync_fixed_s
    host = work.samples * assume.host_per_sample_s
    learn = logprob + train + optimizer + host
    apart = config.cluster.placement == "disaggregated" and config.rollout.max_staleness > 0
    step = (max(rollout, learn) if apart else rollout + learn) + sync
    return StepTime(rollout, logprob, train, optimizer, sync, host, step, concurrency)


def _concurrency(config: Config, server: ServerMemory, work: Workload, servers: int) -> int:
    wanted = -(-work.samples // max(1, servers))
    fitting = int(server.kv_tokens / work.mean_tokens)
    limits = [wanted, fitting, config.serving.max_running_requests or wanted]
    return max(1, min(limits))


def _decode_step_s(
    shape: ModelShape, config: Config, gpu: Gpu, active: float, context: float, assume: Assumptions
) -> float:
    """One token for each of `active` sequences with `context` tokens behind them."""
    tp, width = config.serving.tensor, dtype_bytes(config)
    kv = active * context * shapes.kv_bytes_per_token(shape, width) / min(tp, shape.num_kv_groups)
    read = (server_weight_bytes(shape, config) / tp + kv) / (gpu.hbm * assume.decode_bandwidth)
    compute = shapes.forward_flops(shape, active, context) / (tp * gpu.bf16 * assume.prefill_mfu)
    reduce = 0.0 if tp == 1 else 2 * shape.num_layers * 15e-6  # two all-reduces per layer, latency-bound
    return assume.decode_overhead_s + max(read, compute) + reduce


def _rollout_s(
    shape: ModelShape, config: Config, gpu: Gpu, work: Workload, servers: int, concurrency: int, assume: Assumptions
) -> float:
    """All trajectories of a step: full batches while there are more than fit, then the thinning tail."""
    limit, mean = work.max_response, work.response_tokens
    power = max(0.0, limit / mean - 1)
    tail = 0.0
    for i in range(_POINTS):
        position = (i + 0.5) / _POINTS
        active = concurrency * (1 - position) ** power
        context = work.prompt_tokens + position * limit
        tail += _decode_step_s(shape, config, gpu, max(active, 1.0), context, assume) * limit / _POINTS
    waiting = max(0.0, work.samples / max(1, servers) - concurrency)
    full = _decode_step_s(shape, config, gpu, concurrency, work.mean_tokens, assume)
    prefill = shapes.forward_flops(shape, work.samples / servers * work.prompt_tokens, work.prompt_tokens)
    prefill /= config.serving.tensor * gpu.bf16 * assume.prefill_mfu * config.rollout.group_size
    return tail + waiting * mean / concurrency * full + prefill + work.tool_calls * assume.tool_call_s


def _optimizer_s(shape: ModelShape, config: Config, gpu: Gpu, data: int, nodes: int, assume: Assumptions) -> float:
    """Gradient reduction, Adam and parameter gathering of all optimizer steps of one RL step."""
    steps = config.updates_per_step
    params = shape.num_parameters / (config.parallel.tensor * config.parallel.pipeline)
    link = gpu.network if nodes > 1 else gpu.nvlink
    wire = params * (4 + dtype_bytes(config)) / (link * assume.collective) if data > 1 else 0.0
    shown = 0.3 if config.trainer.overlap else 1.0
    adam = params / data * 30 / (gpu.hbm * assume.decode_bandwidth)
    if config.trainer.optimizer_offload:
        adam += params / data * 24 / 20e9  # both ways over PCIe
    return steps * (wire * shown + adam)
