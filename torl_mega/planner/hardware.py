"""What the planner knows of GPUs and networks, and the efficiencies it assumes. Every figure names its source.

Peaks are the vendor's dense figures. Efficiencies are *assumptions*, set from published runs of comparable systems
(table in docs/cluster.md); no figure here was measured by this project on a GPU. A plan prints them beside its times.
"""

from __future__ import annotations

from dataclasses import dataclass

from torl_mega.errors import ConfigError

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU and the node around it. Bandwidths in bytes/s and one direction, compute in FLOP/s."""

    name: str
    memory: float  # bytes that torch reports as total
    bf16: float  # dense
    fp8: float | None  # dense; None = the chip has no FP8
    hbm: float  # memory bandwidth
    nvlink: float  # to the other GPUs of its node
    network: float  # its part of the node's NICs
    cores: int  # CPU cores per GPU in the usual 8-GPU server


# NVIDIA data sheets: A100-SXM4-80GB, H100-SXM5, H200-SXM5, HGX B200; NICs as in DGX (200 Gb/s, 400 Gb/s per GPU).
# `memory` is what the driver leaves of the nominal size (e.g. 79.1 of 80 GB on H100, 139.8 GiB of 141 GB on H200).
GPUS: dict[str, Gpu] = {
    "a100": Gpu("a100", 79.1 * GIB, 312e12, None, 2.04e12, 300e9, 25e9, 16),
    "h100": Gpu("h100", 79.1 * GIB, 989e12, 1979e12, 3.35e12, 450e9, 50e9, 24),
    "h200": Gpu("h200", 139.8 * GIB, 989e12, 1979e12, 4.80e12, 450e9, 50e9, 24),
    "b200": Gpu("b200", 178.4 * GIB, 2250e12, 4500e12, 7.70e12, 900e9, 50e9, 28),
    # One "GPU" of a CPU plan is one core: what a 2020s server core does in torch fp32 matmuls. Memory is not limited
    # per rank, and nothing compares the sum over a node with what is there.
    "cpu": Gpu("cpu", float("inf"), 4e10, None, 1e10, 2e9, 1e9, 1),
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Efficiencies behind predicted times, as fractions of the peaks above, and fixed costs."""

    train_mfu: float = 0.40  # packed BF16 training of a 7B at TP <= 2 on H100-class; good systems report 35-45 %
    forward_mfu: float = 0.45  # log-prob pass: no backward, no communication of gradients
    fp8_gain: float = 1.3  # FP8 over BF16 end to end in training; published gains run from 1.15 to 1.45
    tp_loss: float = 0.06  # lost per doubling of the tensor-parallel size (inside NVLink)
    decode_bandwidth: float = 0.65  # fraction of memory bandwidth that decoding reaches with CUDA graphs
    decode_overhead_s: float = 0.004  # scheduler and launches per decode step, whatever the batch
    prefill_mfu: float = 0.40
    moe: float = 0.60  # factor on both mfu with experts: Megatron-LM#5728 has 240 TFLOP/s per H100 for Qwen3-30B-A3B
    collective: float = 0.70  # fraction of link bandwidth that large collectives reach
    sync_fixed_s: float = 1.0  # pause, flush and checksums of one weight sync
    tool_call_s: float = 0.6  # one snippet, with its queue, on an unloaded pool
    mean_fraction: float = 0.35  # mean response length over its limit; the longest of a batch always reaches the limit
    host_per_sample_s: float = 0.002  # rewards, packing, recording: rank 0's part per trajectory
    context_gib: float = 0.6  # CUDA context and libraries, per process
    nccl_gib: float = (
        1.0  # NCCL buffers of a trainer rank (TP, PP, DP and sync groups), or of a server's rank among several
    )
    fragmentation: float = 0.04  # of what the trainer allocates dynamically


def gpu(name: str) -> Gpu:
    """The table row of `name`. Raises ConfigError with the known names."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: not in the table; known: auto, {', '.join(GPUS)}")
    return GPUS[name]


def name_of(product: str, memory_mib: int) -> str | None:
    """Table name of a product as nvidia-smi prints it, e.g. `NVIDIA H100 80GB HBM3`; None when it is not in the table."""
    lowered = product.lower()
    match = next((known for known in ("b200", "h200", "h100", "a100") if known in lowered), None)
    return None if match in ("a100", "h100") and memory_mib < 70_000 else match
