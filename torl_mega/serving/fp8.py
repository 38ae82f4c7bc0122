"""Quantises weights to block-wise FP8 on their way to the servers: e4m3 values and one fp32 scale per 128 x 128 block.

    name.weight             [rows, columns] float8_e4m3fn
    name.weight_scale_inv   [ceil(rows / 128), ceil(columns / 128)] float32;  weight = value * scale_inv

Contract: quantised from the very tensors that `weights()` yields, after resharding, so every server holds the numbers the
trainer's weights round to, whatever the layout. Only the linear layers of the decoder are quantised; embeddings, head,
norms and biases keep the model's type. Which models can be served so, and how a server is told: fp8_format.py.
Source: DeepSeek-V3's `weight_dequant` (arXiv 2412.19437, section 3.3); the floor of the block maximum is slime's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F

from torl_mega.interfaces import NamedTensor, WeightSink
from torl_mega.serving.fp8_format import BLOCK

_MAX = 448.0  # largest finite e4m3fn
_FLOOR = 1e-4  # an all-zero block gets a scale, not a division by zero


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> (float8_e4m3fn of the same shape, fp32 scales per block)."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.size(0) // BLOCK, BLOCK, padded.size(1) // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=_FLOOR) / _MAX
    values = (blocks / scale[:, None, :, None]).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn)
    return values.view_as(padded)[:rows, :columns].contiguous(), scale


def is_quantized(name: str) -> bool:
    """Whether this HF tensor is a linear weight of the decoder."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def quantize_stream(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """HF-named tensors, in which every linear weight becomes its FP8 values followed by their scales."""
    for name, tensor in tensors:
        if not is_quantized(name):
            yield name, tensor
            continue
        values, scale = quantize_blocks(tensor)
        yield name, values
        yield f"{name}_scale_inv", scale


class Fp8Sink:
    """Quantises what another sink sends (`serving.weight_dtype = fp8_block`)."""

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        return self._sink.update(quantize_stream(tensors), version=version)
