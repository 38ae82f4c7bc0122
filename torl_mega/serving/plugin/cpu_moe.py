"""What SGLang 0.5.23 computes with a Triton kernel in a Qwen2-MoE, which a CPU has none of: the gate of the shared expert."""

from __future__ import annotations

import torch


def gate_sigmoid_mul_add(hidden: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, output: torch.Tensor) -> None:
    """output += sigmoid(hidden · gate) * shared, in fp32 as the kernel does it (kernels/ops/elementwise/elementwise.py,
    fused_gate_sigmoid_mul_add). hidden, shared, output [t, H], gate [H]."""
    weight = torch.sigmoid(hidden.float() @ gate.float())
    output.copy_(output.float() + weight[:, None] * shared.float())
