"""The block quantiser against a plain loop over blocks, bit for bit, and against the error bound of e4m3."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torl_mega.trainer.fp8 import dequantize_blocks, quantize_blocks, quantize_stream


def plain_reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.size(0)):
        for j in range(scales.size(1)):
            part = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            block = weight[part].to(torch.float32)
            largest = max(float(block.abs().max()), float(np.float32(1e-4)))
            scale = np.float32(largest) / np.float32(448.0)
            scales[i, j] = float(scale)
            values[part] = (block / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scales


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (100, 300), (129, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_to_plain_loop(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1) * 3).to(dtype)
    values, scales = quantize_blocks(weight)
    wanted_values, wanted_scales = plain_reference(weight)
    assert torch.equal(values.view(torch.uint8), wanted_values.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


def test_error_is_that_of_three_mantissa_bits() -> None:
    torch.manual_seed(1)
    weight = torch.randn(256, 256)
    values, scales = quantize_blocks(weight)
    error = (dequantize_blocks(values, scales) - weight).abs()
    largest = weight.view(2, 128, 2, 128).abs().amax((1, 3)).repeat_interleave(128, 0).repeat_interleave(128, 1)
    # half a step of three mantissa bits, and half the smallest subnormal (2^-9) near zero
    assert bool((error <= weight.abs() / 16 + largest / 448 * 2**-10 + 1e-7).all())


def test_zero_block_and_dead_rows() -> None:
    weight = torch.zeros(256, 128)
    weight[200, 3] = 5.0
    values, scales = quantize_blocks(weight)
    assert torch.equal(dequantize_blocks(values, scales), weight)
    assert scales[0, 0] == torch.tensor(1e-4) / 448


def test_stream_quantises_linear_layers_only() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias",
             "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"]  # fmt: skip
    tensors = [(n, torch.ones(4, 4) if n.endswith("proj.weight") or "e" in n[:8] else torch.ones(4)) for n in names]
    out = dict(quantize_stream(tensors))
    assert [n for n in out if n.endswith("scale_inv")] == [
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.mlp.down_proj.weight_scale_inv",
    ]
    assert {n for n, t in out.items() if t.dtype is torch.float8_e4m3fn} == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    }
