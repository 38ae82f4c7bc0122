"""SGLang on a machine without a GPU: the two entry points that SGLang 0.5.23 looks up by itself.

`activate` (group `sglang.srt.platforms`) offers SGLang's own out-of-tree platform interface with its pure torch
kernels; with CUDA present it steps aside. `hooks` (group `sglang.srt.plugins`) runs in every SGLang process.
Limits: text models in fp32 or bf16, torch-native attention, no FP8, no CUDA graphs, no deterministic mode.
The out-of-tree interface changed between SGLang 0.5.21 and 0.5.23, so SGLang is pinned exactly.

SGLang imports this module in every process it starts, so nothing heavy is imported at the top.
"""

from __future__ import annotations

from typing import Any


def activate() -> str | None:
    """Where the platform class is, or None where CUDA is."""
    import torch

    return None if torch.cuda.is_available() else "torl_mega.serving.plugin.native_cpu:NativeCpuPlatform"


def hooks() -> None:
    """Registers what SGLang must do differently, with its hook registry."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from torl_mega.serving.plugin import held_weights as weight_audit
    from torl_mega.serving.plugin import seeded_sampling, weight_receive

    HookRegistry.register("sglang.srt.utils.weight_checker.WeightChecker.handle", weight_audit.handle, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.receive_weights_from_distributed",
        weight_receive.receive,
        HookType.AROUND,
    )
    if not torch.cuda.is_available():
        HookRegistry.register(
            "sglang.srt.mem_cache.pool_host.common._cuda_host_register", _no_host_register, HookType.REPLACE
        )
        HookRegistry.register(
            "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
            seeded_sampling.from_schedule_batch,
            HookType.AROUND,
        )
        HookRegistry.register(
            "sglang.srt.layers.sampler.murmur_hash32", seeded_sampling.murmur_hash32, HookType.REPLACE
        )
        from torl_mega.serving.plugin import cpu_attention, cpu_start

        HookRegistry.register(
            "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
            cpu_attention.BatchedAttention,
            HookType.REPLACE,
        )
        for method in ("_launch_scheduler_processes", "_launch_detokenizer_subprocesses"):
            HookRegistry.register(f"sglang.srt.entrypoints.engine.Engine.{method}", cpu_start.forked, HookType.AROUND)
        HookRegistry.register(
            "sglang.srt.entrypoints.http_server._freeze_gc_after_server_warmup", cpu_start.no_freeze, HookType.REPLACE
        )


def _no_host_register(*_args: Any, **_kwargs: Any) -> None:
    """Pinning host memory is CUDA's business; SGLang asks for it even on a CPU when routed experts are returned."""
