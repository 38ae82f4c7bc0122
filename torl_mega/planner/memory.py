"""Predicts the memory of one GPU (or of one process on a CPU) in every phase of a step.

Contract: `trainer_memory` and `server_memory` are closed forms over the model's shape, `parallel`, `trainer` and
`serving`; `phases` adds them up per phase the way the processes really overlap. Where ranks and servers take turns
(serving/turns.py) each phase counts what its turn leaves on the GPU; else both keep all they have, all the time. A save takes
memory of the host, not of the GPU. Everything is in bytes.

Source of the transformer terms: Korthikanti et al. 2205.05198 section 4, redone for what is trained here: SwiGLU,
grouped queries, flash attention, no dropout, packed sequences, a chunked output head. Megatron's own report
(`megatron/training/theoretical_memory_usage.py`) is compared in docs/cluster.md.
Limits: stages of equally many layers; experts that are chosen alike; allocator behaviour is one percentage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torl_mega.config import Config, ParallelConfig
from torl_mega.layout import ModelShape, padded_vocab
from torl_mega.planner.hardware import GIB, Assumptions, Gpu

GRAD_BYTES = 4  # Megatron accumulates and reduces gradients in fp32
LOGIT_BYTES = 16  # per logit of the chunk at work: four fp32 tensors at the worst moment of trainer/vocab_parallel.py


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Bytes of the most loaded trainer rank. Persistent parts first, then what one phase adds at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass, of all micro-batches in flight
    working: float  # at work while those are kept: a chunk of logits and the head's gradient, or a recomputed layer
    forward_working: float  # of the log-prob pass: a chunk of logits, or a layer
    batch: float  # token ids, masks, log-probs of a step's samples
    sync: float  # two buckets and the largest tensor, gathered
    saved_weights: float  # a rank's share of a checkpoint, copied to host memory while it is written
    saved_optimizer: float
    fixed: float  # context, NCCL

    @property
    def resident(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.batch + self.fixed


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """Bytes of one server rank."""

    weights: float
    kv_pool: float
    kv_tokens: float  # tokens, not bytes: how many fit into the pool
    process: float  # context, NCCL
    graphs: float  # CUDA graphs, outside of torch's memory
    reserve: float  # what SGLang leaves free for activations and graphs

    @property
    def awake(self) -> float:
        """Beside weights and KV cache, while it samples."""
        return self.process + self.reserve

    @property
    def asleep(self) -> float:
        """What is left of it once weights, KV cache and unused activations are gone."""
        return self.process + self.graphs

    @property
    def mem_fraction(self) -> float:
        """SGLang's mem-fraction-static, of what is free when it starts: with it the KV cache has at least the planned tokens
        wherever the planned bytes are free, and the tokens themselves are its upper limit."""
        held = self.weights + self.kv_pool
        return math.ceil(held / (held + self.reserve) * 1e4) / 1e4


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """Bytes of one phase on the fullest GPU of a kind: named parts, their sum and what the GPU has."""

    phase: str
    where: str  # "trainer", "server", "shared" or "host"
    parts: dict[str, float] = field(default_factory=dict)
    available: float = math.inf

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def spare(self) -> float:
        return self.available - self.total


def dtype_bytes(config: Config) -> int:
    """Bytes per element of the model's weights."""
    return 4 if config.model.dtype == "float32" else 2


def layer_activation_bytes(shape: ModelShape, parallel: ParallelConfig, width: int, on_cpu: bool) -> float:
    """Bytes per token that one layer keeps for its backward pass, `width` bytes per element.

    Whole on each tensor rank, or sharded under sequence parallelism: the inputs of both norms and their outputs.
    Always sharded: fused q/k/v, rotated q and k, attention output; gate and up, and their product.
    The local (CPU) layers fuse nothing: norms also keep the normalised input, rotary its cosines and sines, attention its
    own copies of q, k and v, and SwiGLU five tensors of width f (counted with torch's saved_tensors_hooks).
    """
    h, q, kv, experts = shape.hidden, shape.q_width, shape.kv_width, shape.experts
    f = experts.shared_ffn if experts else shape.ffn
    if on_cpu:
        whole = 6 * h + 4 * shape.head_dim
        sharded = 3 * q + 2 * kv + 5 * f
    else:
        whole = 4 * h
        sharded = (q + 2 * kv) + (q + kv) + q + 3 * f
    softmax = 4 * shape.num_heads / parallel.tensor  # flash attention keeps one fp32 sum per head and token
    kept = width * (whole / _sequence_ranks(parallel) + sharded / parallel.tensor) + softmax
    if experts is None:
        return kept
    # as an expert gets and gives them: k rows of h each, and three of its width; the router's logits and choices in fp32
    rows = experts.top_k * (2 * h + 3 * experts.ffn)
    return kept + (width * rows + 12 * experts.count) / _sequence_ranks(parallel)


def _sequence_ranks(parallel: ParallelConfig) -> int:
    """Ranks that share the activations between the tensor-parallel parts of a layer."""
    return parallel.tensor if parallel.sequence else 1


def micro_batches_in_flight(parallel: ParallelConfig, num_micro_batches: int) -> float:
    """Micro-batches whose activations the first stage holds at once, counted in whole-stage activations (1F1B)."""
    pp, vpp = parallel.pipeline, parallel.virtual_pipeline
    if pp == 1:
        return 1.0
    if vpp == 1:
        return float(min(pp, num_micro_batches))
    return min(pp * (1 + (pp - 1) / (pp * vpp)), num_micro_batches)


def num_micro_batches(config: Config, data: int, mean_tokens: float) -> int:
    """Micro-batches per data-parallel rank and optimizer step."""
    tokens = config.trainer.mini_batch_samples * mean_tokens / data
    return max(1, math.ceil(tokens / config.trainer.micro_batch_tokens))


def trainer_memory(
    shape: ModelShape, config: Config, data: int, mean_tokens: float, assume: Assumptions, on_cpu: bool
) -> TrainerMemory:
    """Memory of the most loaded trainer rank.

    data: data-parallel size; mean_tokens: prompt plus response of an average trajectory.
    """
    parallel, trainer, width = config.parallel, config.trainer, dtype_bytes(config)
    params = max(shape.stage_parameters(parallel))
    copies = data * parallel.context  # ranks that hold the same parameters, experts aside
    expert_copies = max(1, copies * parallel.tensor // (parallel.expert * parallel.expert_tensor))
    experts = shape.stage_expert_parameters(parallel)
    shared_out = (params - experts) / copies + experts / expert_copies
    master = 0 if width == 4 else 4  # fp32 weights are their own masters
    tokens = trainer.micro_batch_tokens / parallel.context
    layers = shape.num_layers / parallel.pipeline
    flight = micro_batches_in_flight(parallel, num_micro_batches(config, data, mean_tokens))
    layer = layer_activation_bytes(shape, parallel, width, on_cpu)
    hidden = width * shape.hidden / _sequence_ranks(parallel)
    # `selective` recomputes the attention core, of which flash attention keeps nothing
    full = trainer.recompute == "full"
    kept = tokens * layers * flight * (hidden if full else layer)
    chunk = min(trainer.logprob_chunk_tokens, tokens)
    logits = chunk * padded_vocab(shape.vocab, parallel.tensor) / parallel.tensor * LOGIT_BYTES
    head_gradient = 2 * GRAD_BYTES * padded_vocab(shape.vocab, parallel.tensor) * shape.hidden / parallel.tensor
    head_copy = head_gradient / 2 if config.model.fp32_head and width < 4 else 0.0
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    dynamic = 1 + (0 if on_cpu else assume.fragmentation)
    largest = padded_vocab(shape.vocab, parallel.tensor) * shape.hidden
    # in its buffers every tensor begins at a multiple of 64 elements (param_and_grad_buffer.py), which norms of small heads leave
    gaps = 2 * layers * (-shape.head_dim % 64) * (shape.qk_norm and trainer.distributed_optimizer)
    return TrainerMemory(
        weights=(params + gaps) * width,
        gradients=(params + gaps) * GRAD_BYTES,
        optimizer=0.0
        if trainer.optimizer_offload and not on_cpu
        else (8 + master) * (shared_out if trainer.distributed_optimizer else params),
        activations=dynamic * (kept + tokens * 3 * hidden),
        working=dynamic * max(logits + head_gradient + head_copy, tokens * layer if full else 0.0),
        forward_working=dynamic * (max(logits + head_copy, tokens * layer) + tokens * 3 * hidden),
        batch=samples * mean_tokens * 25 / data,
        saved_weights=shared_out * width,
        saved_optimizer=shared_out * (12 if master or trainer.distributed_optimizer else 8),
        sync=min(2 * config.serving.bucket_mb * 2**20, shape.num_parameters * width) + 2 * width * largest,
        fixed=0.0 if on_cpu else (assume.context_gib + assume.nccl_gib) * GIB,
    )


def route_bytes(shape: ModelShape, config: Config, tokens: float) -> float:
    """Host memory of one rank for the experts that `tokens` went to (algo.router_replay), as int16."""
    if shape.experts is None or config.algo.router_replay == "off":
        return 0.0
    return 2.0 * tokens * shape.num_layers * shape.experts.top_k


def server_weight_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes of the weights of one server, over all its ranks; fp8_block takes one byte per element of the linear layers."""
    width = dtype_bytes(config)
    linear = shape.num_layers * shape.layer_matrices
    saved = linear * (width - 1) if config.serving.weight_dtype == "fp8_block" else 0
    return shape.num_parameters * width - saved


def server_memory(shape: ModelShape, config: Config, gpu: Gpu, assume: Assumptions) -> ServerMemory:
    """Memory of one server rank: `mem_fraction` of the GPU for weights and KV pool, and what SGLang itself sets aside."""
    serving, width = config.serving, dtype_bytes(config)
    weights = server_weight_bytes(shape, config) / serving.tensor
    per_token = shape.kv_bytes_per_token(width) / min(serving.tensor, shape.num_kv_groups)
    if math.isinf(gpu.memory):
        pool = (serving.max_total_tokens or 8 * config.max_context_tokens) * per_token
        return ServerMemory(weights, pool, pool / per_token, 0.0, 0.0, 0.0)
    pool = max(0.0, serving.mem_fraction * gpu.memory - weights)
    if serving.max_total_tokens:
        pool = min(pool, serving.max_total_tokens * per_token)
    process = (assume.context_gib + (assume.nccl_gib if serving.tensor > 1 else 0.0)) * GIB
    graphs, reserve = sglang_reserve(config, gpu)
    return ServerMemory(weights, pool, pool / per_token, process, graphs, reserve)


def sglang_reserve(config: Config, gpu: Gpu) -> tuple[float, float]:
    """Bytes of CUDA graphs, and of graphs and activations together, as SGLang 0.5.23 reckons them before it fixes its own
    mem-fraction-static (srt/arg_groups/memory_hook.py:59-401). It counts in MiB."""
    serving = config.serving
    large = gpu.memory >= 160 * GIB
    decode = 512 if large or serving.tensor >= 4 else 256  # requests of the largest graph
    decode = min(decode, serving.max_running_requests or decode)
    chunk = 16384 if large else 8192  # tokens of one prefill
    graphs = 2 * decode + 8 * len(_prefill_graphs(min(chunk, serving.max_total_tokens or chunk)))
    reserve = max(512 + 1.5 * chunk + serving.tensor / 8 * 1024 + graphs, 10 * 1024)
    return graphs * 2**20, reserve * 2**20


def _prefill_graphs(most: int) -> list[int]:
    """Tokens of each prefill graph (srt/arg_groups/cuda_graph_hook.py:480-497)."""
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, most + 1, 512))
    return [size for step in steps for size in range(*step) if size <= most]


def phases(
    trainer: TrainerMemory, server: ServerMemory, gpu: Gpu, config: Config, *, colocated: bool, turns: bool
) -> list[PhaseMemory]:
    """The memory of every phase of a step, on a GPU of each kind that takes part in it, then of a rank's host memory."""
    weights = {"weights": trainer.weights}
    fixed = {"batch": trainer.batch, "context + NCCL": trainer.fixed}
    updating = {"gradients": trainer.gradients, "optimizer": trainer.optimizer}
    serve = {"server weights": server.weights, "KV cache": server.kv_pool, _SERVER: server.awake}
    backward = {"activations": trainer.activations, "logits, layer at work": trainer.working}
    scoring = {"logits, layer at work": trainer.forward_working}
    buckets = {"sync buckets": trainer.sync}
    save = PhaseMemory("save", "host", {"weights": trainer.saved_weights, "optimizer": trainer.saved_optimizer})
    if turns:
        asleep, loading = {_SERVER: server.asleep}, {"server weights": server.weights, _SERVER: server.asleep}
        parked = weights if config.trainer.park_weights else {}
        of = {
            "rollout": {**({} if parked else weights), **fixed, **serve},
            "log-probs": {**weights, **updating, **fixed, **asleep, **scoring},
            "training": {**weights, **updating, **fixed, **asleep, **backward},
            "weight sync": {**weights, **fixed, **loading, **buckets},
            "save": {**weights, "optimizer": trainer.optimizer, **fixed, **loading},
        }
        found = [PhaseMemory(phase, "shared", parts, gpu.memory) for phase, parts in of.items()]
        return [*found, PhaseMemory("rollout", "host", {**parked, "optimizer": trainer.optimizer}), save]
    own = {**weights, **updating, **fixed, **(serve if colocated else {})}
    where, sampling = ("shared", "shared") if colocated else ("trainer", "server")
    found = [
        PhaseMemory("rollout", sampling, own if colocated else serve, gpu.memory),
        PhaseMemory("log-probs", where, {**own, **scoring}, gpu.memory),
        PhaseMemory("training", where, {**own, **backward}, gpu.memory),
        PhaseMemory("weight sync", where, {**own, **buckets}, gpu.memory),
    ]
    if not colocated:
        found.append(PhaseMemory("weight sync", "server", {**serve, "sync buckets": trainer.sync / 2}, gpu.memory))
    return [*found, save]


_SERVER = "server context + graphs"
