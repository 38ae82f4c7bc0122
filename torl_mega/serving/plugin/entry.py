"""What SGLang 0.5.23 loads of ours by itself, in every process it starts: the two entry points of pyproject.toml.

    everywhere         weight hooks: verification (held_weights.py) and reception in place (weight_receive.py)
    without a GPU too  a CPU platform with SGLang's pure torch kernels (native_cpu.py), and sampling seeds (seeded_sampling.py)

Contract: this package runs inside SGLang and imports nothing of torl_mega but itself; nothing heavy at the top of this
module. SGLang's out-of-tree interface changed between 0.5.21 and 0.5.23, so SGLang is pinned exactly.
Limits of the CPU platform: text models in fp32 or bf16, torch-native attention, no FP8, no CUDA graphs, no deterministic mode.
"""

from __future__ import annotations

from typing import Any


def activate() -> str | None:
    """Entry point of group `sglang.srt.platforms`: where the CPU platform's class is, or None where CUDA is."""
    import torch

    return None if torch.cuda.is_available() else "torl_mega.serving.plugin.native_cpu:NativeCpuPlatform"


def hooks() -> None:
    """Entry point of group `sglang.srt.plugins`: registers our functions around or instead of SGLang's own."""
    import torch

    _weight_hooks()
    if not torch.cuda.is_available():
        _cpu_hooks()


def _weight_hooks() -> None:
    """The server's half of a verified weight sync, on GPUs and CPUs alike."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from torl_mega.serving.plugin import held_weights, weight_receive

    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    HookRegistry.register("sglang.srt.utils.weight_checker.WeightChecker.handle", held_weights.handle, HookType.AROUND)
    HookRegistry.register(f"{updater}.receive_weights_from_distributed", weight_receive.receive, HookType.AROUND)


def _cpu_hooks() -> None:
    """What SGLang lacks on a CPU: seeds count in sampling, and host memory need not be pinned."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from torl_mega.serving.plugin.seeded_sampling import from_schedule_batch, murmur_hash32

    batch = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
    HookRegistry.register(f"{batch}.from_schedule_batch", from_schedule_batch, HookType.AROUND)
    HookRegistry.register("sglang.srt.layers.sampler.murmur_hash32", murmur_hash32, HookType.REPLACE)
    pin = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"
    HookRegistry.register(pin, _no_host_register, HookType.REPLACE)


def _no_host_register(*_args: Any, **_kwargs: Any) -> None:
    """Does nothing: SGLang pins host memory with CUDA even on a CPU when routed experts are returned."""
