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

    from torl_mega.serving.plugin import held_weights, stop_strings, weight_receive

    around = {
        "utils.weight_checker.WeightChecker.handle": held_weights.handle,
        "model_executor.model_runner_components.weight_updater.WeightUpdater.receive_weights_from_distributed": (
            weight_receive.receive
        ),
        "managers.schedule_batch.Req._check_str_based_finish": stop_strings.check,
    }
    replace: dict[str, Any] = {}
    if not torch.cuda.is_available():
        from torl_mega.serving.plugin import cpu_attention, cpu_start, seeded_sampling

        around |= {
            "sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch": seeded_sampling.from_schedule_batch,
            "entrypoints.engine.Engine._launch_scheduler_processes": cpu_start.forked,
            "entrypoints.engine.Engine._launch_detokenizer_subprocesses": cpu_start.forked,
        }
        replace |= {
            "mem_cache.pool_host.common._cuda_host_register": _no_host_register,
            "layers.sampler.multinomial_with_seed": seeded_sampling.multinomial_with_seed,
            "layers.attention.torch_native_backend.TorchNativeAttnBackend": cpu_attention.BatchedAttention,
            "entrypoints.http_server._freeze_gc_after_server_warmup": cpu_start.no_freeze,
        }
    for kind, chosen in ((HookType.AROUND, around), (HookType.REPLACE, replace)):
        for target, hook in chosen.items():
            HookRegistry.register(f"sglang.srt.{target}", hook, kind)


def _no_host_register(*_args: Any, **_kwargs: Any) -> None:
    """Pinning host memory is CUDA's business; SGLang asks for it even on a CPU when routed experts are returned."""
