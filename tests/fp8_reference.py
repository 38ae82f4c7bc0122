"""What a server computes with that holds block-wise FP8 weights."""

from __future__ import annotations

import torch


def dequantize_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[rows, columns] e4m3 and one fp32 scale per 128 x 128 block -> fp32 weights."""
    rows, columns = values.shape
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return values.float() * spread
