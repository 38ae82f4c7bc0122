"""What SGLang 0.5.23 loads of ours by itself, in every process it starts: the two entry points of pyproject.toml.

    everywhere         weights: verification (held_weights.py), reception in place (weight_receive.py); letting go of
                       memory (sleep.py); stop_strings.py; the run's secret (door.py)
    without a GPU too  a CPU platform with SGLang's pure torch kernels (native_cpu.py), attention for whole batches
                       (cpu_attention.py), experts (cpu_moe.py), seeds that count
                       (seeded_sampling.py), a quick start (cpu_start.py)

Contract: this package runs inside SGLang and imports nothing of torl_mega but itself; nothing heavy at the top of this
module. SGLang's out-of-tree interface changed between 0.5.21 and 0.5.23, so SGLang is pinned exactly.
Limits of the CPU platform: text models in fp32 or bf16, torch-native attention, no FP8, no CUDA graphs, no deterministic mode.
"""

from __future__ import annotations

from typing import Any

_MANAGER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


def activate() -> str | None:
    """Entry point of group `sglang.srt.platforms`: where the CPU platform's class is, or None where CUDA is."""
    import torch

    return None if torch.cuda.is_available() else "torl_mega.serving.plugin.native_cpu:NativeCpuPlatform"


def hooks() -> None:
    """Entry point of group `sglang.srt.plugins`: registers our functions around or instead of SGLang's own."""
    import torch

    _common_hooks()
    if not torch.cuda.is_available():
        _cpu_hooks()


def _common_hooks() -> None:
    """On GPUs and CPUs alike: the server's half of a verified weight sync, and a cheaper search for stop strings."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from torl_mega.serving.plugin import door, held_weights, sleep, stop_strings, weight_receive

    around = {
        "utils.weight_checker.WeightChecker.handle": held_weights.handle,
        "model_executor.model_runner_components.weight_updater.WeightUpdater.receive_weights_from_distributed": (
            weight_receive.receive
        ),
        f"{_MANAGER}.release_memory_occupation": sleep.release,
        f"{_MANAGER}.resume_memory_occupation": sleep.resume,
        "managers.schedule_batch.Req._check_str_based_finish": stop_strings.check,
        "entrypoints.http_server._setup_and_run_http_server": door.with_keys,
    }
    for target, hook in around.items():
        HookRegistry.register(f"sglang.srt.{target}", hook, HookType.AROUND)


def _cpu_hooks() -> None:
    """What SGLang lacks on a CPU: batched attention, seeds that count in sampling, a quick start, no pinned memory."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from torl_mega.serving.plugin import cpu_attention, cpu_moe, cpu_start, seeded_sampling

    around = {
        "sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch": seeded_sampling.from_schedule_batch,
        "layers.moe.fused_moe_native.moe_forward_native": cpu_moe.of_this_rank,
        "entrypoints.engine.Engine._launch_scheduler_processes": cpu_start.forked,
        "entrypoints.engine.Engine._launch_detokenizer_subprocesses": cpu_start.forked,
    }
    replace: dict[str, Any] = {
        "mem_cache.pool_host.common._cuda_host_register": _no_host_register,
        "layers.sampler.multinomial_with_seed": seeded_sampling.multinomial_with_seed,
        "models.qwen2_moe.fused_gate_sigmoid_mul_add": cpu_moe.gate_sigmoid_mul_add,
        "layers.attention.torch_native_backend.TorchNativeAttnBackend": cpu_attention.BatchedAttention,
        "entrypoints.http_server._freeze_gc_after_server_warmup": cpu_start.no_freeze,
    }
    for kind, chosen in ((HookType.AROUND, around), (HookType.REPLACE, replace)):
        for target, hook in chosen.items():
            HookRegistry.register(f"sglang.srt.{target}", hook, kind)


def _no_host_register(*_args: Any, **_kwargs: Any) -> None:
    """Does nothing: SGLang pins host memory with CUDA even on a CPU when routed experts are returned."""
