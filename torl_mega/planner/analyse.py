"""Analyses a config on given hardware: placement, memory per phase, predicted times, and what cannot work.

Contract: a pure function of its arguments (and of the model's config.json, where there is one); nothing is started.
`Analysis.problems` names every reason why the run cannot work; empty means it can be queued.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torl_mega.algo.advice import advice
from torl_mega.config import Config
from torl_mega.errors import ConfigError
from torl_mega.layout import ModelShape, check_layout, check_router_settings, check_served_experts, describe_model
from torl_mega.planner import memory, steptime
from torl_mega.planner.hardware import GIB, Assumptions, Gpu
from torl_mega.planner.hardware import gpu as gpu_row
from torl_mega.planner.known_models import hf_config
from torl_mega.planner.memory import PhaseMemory, ServerMemory, TrainerMemory
from torl_mega.planner.placement import Placement, place, takes_turns
from torl_mega.planner.steptime import Setup, StepTime, Workload
from torl_mega.serving.fp8_format import check_fp8_serving

MIN_CONTEXTS = 4  # full-length sequences a server's KV cache must hold; below that decoding crawls


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the run is planned for. `hosts` and `cores` come from the allocation, once there is one."""

    nodes: int
    gpus: int  # per node
    gpu: str  # a name of planner/hardware.py's table
    hosts: tuple[str, ...] = ()
    cores: int = 0  # per node; 0 = the usual for that GPU
    base_port: int = 20000


@dataclass(frozen=True, slots=True)
class Analysis:
    hardware: Hardware
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    shape: ModelShape | None = None
    placement: Placement | None = None
    trainer: TrainerMemory | None = None
    server: ServerMemory | None = None
    phases: tuple[PhaseMemory, ...] = ()
    work: Workload | None = None
    time: StepTime | None = None

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def num_gpus(self) -> int:
        return self.hardware.nodes * self.hardware.gpus


Placed = tuple[Placement | None, list[str]]


def placed(config: Config, hardware: Hardware) -> Placed:
    """The placement on this hardware, or every reason why there is none."""
    return place(
        config, nodes=hardware.nodes, gpus=hardware.gpus, gpu=hardware.gpu, hosts=hardware.hosts,
        cores=hardware.cores, base_port=hardware.base_port,
    )  # fmt: skip


def analyse(
    config: Config,
    hardware: Hardware,
    assume: Assumptions,
    mean_response: int | None = None,
    *,
    where: Placed | None = None,
) -> Analysis:
    """Everything `torl plan` says. Raises ConfigError only for an unknown GPU; everything else is a problem in the result.
    `where` is what `placed` says of this config, for a caller that knows it already."""
    gpu = gpu_row(hardware.gpu)
    problems: list[str] = []
    placement, complaints = where or placed(config, hardware)
    problems += complaints
    try:
        hf = hf_config(config.model.path)
        shape = describe_model(hf)
    except ConfigError as exc:
        return Analysis(hardware, (*problems, str(exc)), ())
    world = placement.world_size if placement else hardware.nodes * hardware.gpus
    layout = check_layout(hf, config.parallel, world)
    problems += layout
    problems += _settings(config, hf, shape, gpu, placement)
    if placement is None or layout:
        return Analysis(hardware, tuple(problems), (), shape, placement)
    data = world // config.parallel.model_size
    work = steptime.workload(config, assume, mean_response)
    on_cpu = hardware.gpu == "cpu"
    trainer = memory.trainer_memory(shape, config, data, work.mean_tokens, assume, on_cpu)
    server = memory.server_memory(shape, config, gpu, assume)
    turns = takes_turns(config, placement)
    found = tuple(memory.phases(trainer, server, gpu, config, colocated=placement.colocated, turns=turns))
    problems += _memory_problems(config, found, server, on_cpu)
    servers = max(1, placement.num_servers)
    time = steptime.predict(Setup(shape, config, gpu, assume, world, servers, hardware.nodes), server, work)
    warnings = _warnings(config, placement, server, work, time)
    return Analysis(hardware, tuple(problems), tuple(warnings), shape, placement, trainer, server, found, work, time)


def _settings(
    config: Config, hf: Mapping[str, Any], shape: ModelShape, gpu: Gpu, placement: Placement | None
) -> list[str]:
    """Settings that contradict the model, the chip or the layout."""
    problems, serving = [], config.serving
    if config.max_context_tokens > shape.max_positions:
        problems.append(
            f"the longest prompt (data.max_prompt_tokens, eval.max_prompt_tokens) + rollout.max_response_tokens = "
            f"{config.max_context_tokens} is more than the model's {shape.max_positions} positions; lower one of them"
        )
    heads, groups = shape.num_heads, shape.num_kv_groups
    if heads % serving.tensor or (groups % serving.tensor and serving.tensor % groups):
        problems.append(
            f"serving.tensor = {serving.tensor} does not divide the model's {heads} attention and {groups} key/value heads"
        )
    problems += check_served_experts(hf, serving.tensor, serving.expert)
    problems += check_router_settings(hf, config.algo)
    if config.trainer.precision != "default" and gpu.fp8 is None:
        problems.append(
            f"trainer.precision = {config.trainer.precision} needs FP8, which {gpu.name} does not have; take default"
        )
    if serving.weight_dtype == "fp8_block":
        problems += check_fp8_serving(hf, config)
        if gpu.fp8 is None:
            problems.append(f"serving.weight_dtype = fp8_block needs FP8, which {gpu.name} does not have; take model")
    if config.trainer.precision == "mxfp8" and gpu.name != "b200":
        problems.append("trainer.precision = mxfp8 needs Blackwell (b200); take fp8_current or fp8_blockwise")
    if placement and config.trainer.mini_batch_samples * config.parallel.model_size < placement.world_size:
        problems.append(
            f"trainer.mini_batch_samples = {config.trainer.mini_batch_samples} is fewer than the "
            f"{placement.world_size // config.parallel.model_size} data-parallel ranks; some would have nothing to train on"
        )
    return problems


def _memory_problems(config: Config, found: tuple[PhaseMemory, ...], server: ServerMemory, on_cpu: bool) -> list[str]:
    problems = []
    need = MIN_CONTEXTS * config.max_context_tokens
    if not on_cpu and server.kv_tokens < need:
        per_token = server.kv_pool / server.kv_tokens if server.kv_tokens else 0.0
        short = (need - server.kv_tokens) * per_token if per_token else -server.weights
        amount = f"{short / GIB:.1f} GiB short" if short > 0 else "has no room beside the weights"
        problems.append(
            f"does not fit: KV cache {amount} on a server of serving.tensor = {config.serving.tensor} (it holds "
            f"{server.kv_tokens:,.0f} tokens, {MIN_CONTEXTS} full sequences need {need:,}); try serving.mem_fraction above "
            f"{config.serving.mem_fraction}, or serving.tensor = {2 * config.serving.tensor}"
        )
    worst = min(found, key=lambda phase: phase.spare)
    if worst.spare < 0:
        problems.append(
            f"does not fit: {worst.phase} needs {worst.total / GIB:.1f} GiB on each {worst.where} GPU, "
            f"{worst.available / GIB:.1f} GiB are there, {-worst.spare / GIB:.1f} GiB short (largest: {_largest(worst)}); "
            f"try {_remedy(config, worst)}"
        )
    return problems


def _largest(phase: PhaseMemory) -> str:
    name, size = max(phase.parts.items(), key=lambda item: item[1])
    return f"{name} {size / GIB:.1f} GiB"


def _remedy(config: Config, phase: PhaseMemory) -> str:
    name = max(phase.parts, key=lambda part: phase.parts[part])
    tensor = config.parallel.tensor
    apart = ", or cluster.placement = disaggregated" if phase.where == "shared" else ""
    remedies = {
        "KV cache": f"serving.mem_fraction = {_lower_fraction(config, phase):.2f}{apart}",
        "activations": "trainer.recompute = full"
        if config.trainer.recompute != "full"
        else f"trainer.micro_batch_tokens = {max(config.max_train_tokens, config.trainer.micro_batch_tokens // 2)}",
        "logits, layer at work": f"trainer.logprob_chunk_tokens = {config.trainer.logprob_chunk_tokens // 2}",
        "sync buckets": f"serving.bucket_mb = {max(64, config.serving.bucket_mb // 2)}",
        "server weights": f"serving.tensor = {2 * config.serving.tensor}",
    }
    return remedies.get(name, f"parallel.tensor = {2 * tensor}, or more nodes")


def _lower_fraction(config: Config, phase: PhaseMemory) -> float:
    """The memory fraction at which this phase would just fit, rounded down."""
    return max(0.05, math.floor((config.serving.mem_fraction + phase.spare / phase.available) * 100) / 100)


def _warnings(config: Config, placement: Placement, server: ServerMemory, work: Workload, time: StepTime) -> list[str]:
    found = advice(config.algo)
    wanted = -(-work.samples // max(1, placement.num_servers))
    if time.concurrency < wanted and placement.gpu != "cpu":
        found.append(
            f"a server decodes {time.concurrency} of its {wanted} trajectories at once (its KV cache holds "
            f"{server.kv_tokens:,.0f} tokens); the rest wait"
        )
    if config.parallel.tensor > placement.gpus_per_node:
        found.append(
            f"parallel.tensor = {config.parallel.tensor} crosses nodes ({placement.gpus_per_node} GPUs each): slow"
        )
    if config.trainer.precision == "fp8_hybrid_delayed":
        found.append(
            "trainer.precision = fp8_hybrid_delayed is unfit for RL: scoring and update run with different scales; take fp8_current"
        )
    if config.parallel.expert > 1 and config.trainer.precision != "default":
        found.append(
            f"trainer.precision = {config.trainer.precision}: no run has trained experts in FP8 yet; take default"
        )
    imbalance = abs(time.rollout_s - (time.train_s + time.logprob_s)) / time.step_s
    if config.cluster.placement == "disaggregated" and config.rollout.max_staleness == 0:
        found.append(
            "disaggregated and exactly on-policy: servers and trainers wait for each other; see rollout.max_staleness"
        )
    elif config.cluster.placement == "disaggregated" and imbalance > 0.4:
        found.append("rollouts and training take very different times: move nodes with cluster.server_nodes")
    return found
