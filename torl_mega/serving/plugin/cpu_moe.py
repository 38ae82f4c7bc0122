"""What SGLang 0.5.23 lacks for experts on a CPU: the gate of a Qwen2-MoE's shared expert without Triton, and experts that are
spread over the ranks of a server.

Contract: hooks named in entry.py; imported by SGLang's processes only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def gate_sigmoid_mul_add(hidden: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, output: torch.Tensor) -> None:
    """output += sigmoid(hidden · gate) * shared, in fp32 as the kernel does it (kernels/ops/elementwise/elementwise.py,
    fused_gate_sigmoid_mul_add). hidden, shared, output [t, H], gate [H]."""
    weight = torch.sigmoid(hidden.float() @ gate.float())
    output.copy_(output.float() + weight[:, None] * shared.float())


def of_this_rank(
    forward: Callable[..., torch.Tensor], layer: Any, hidden: torch.Tensor, topk: Any, config: Any
) -> torch.Tensor:
    """Around `moe_forward_native` (srt/layers/moe/fused_moe_native.py), which takes -1, an expert of another rank, for an index.

    hidden [t, H], topk weights and ids [t, k] -> [t, H], the part of this rank's experts; SGLang sums over ranks.
    """
    if layer.moe_ep_size == 1:
        return forward(layer, hidden, topk, config)
    assert config.activation == "silu"
    output = torch.zeros_like(hidden, dtype=torch.float32)
    for expert, (gate_up, down) in enumerate(zip(layer.w13_weight, layer.w2_weight, strict=True)):
        tokens, choices = (topk.topk_ids == expert).nonzero(as_tuple=True)
        if tokens.numel():
            gate, up = F.linear(hidden[tokens], gate_up).chunk(2, -1)
            part = F.linear(F.silu(gate) * up, down)
            output.index_add_(0, tokens, part.float() * topk.topk_weights[tokens, choices, None])
    return output.to(hidden.dtype)
