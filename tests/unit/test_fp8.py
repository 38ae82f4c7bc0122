"""The block quantiser against a plain loop, bit for bit, and against the error bound of e4m3; who may serve its output."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fp8_reference import dequantize_blocks

from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, ServerError
from torl_mega.interfaces import NamedTensor
from torl_mega.launch import local
from torl_mega.planner.known_models import KNOWN
from torl_mega.serving.fp8 import Fp8Sink, quantize_blocks, quantize_stream
from torl_mega.serving.fp8_format import check_fp8_serving
from torl_mega.serving.sglang_server import launch_command


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
    outlines = quantize_blocks(weight.to("meta"))  # what ranks without the data make their buckets from
    assert [(o.shape, o.dtype) for o in outlines] == [(values.shape, values.dtype), (scales.shape, scales.dtype)]


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


# ------------------------------------------------------------------------------------------------ servers

FP8 = ("model.dtype=bfloat16", "serving.weight_dtype=fp8_block")


def hf_config(**changes: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("model.dtype=float32", "serving.weight_dtype=fp8_block"), r"needs model\.dtype = bfloat16, found float32"),
        (
            (*FP8, "serving.transport=disk", "serving.disk_dir=/tmp"),
            r"cannot be verified after serving\.transport = disk",
        ),
    ],
)
def test_settings_that_exclude_fp8_servers(overrides: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config("conf/torl_1.5b.yaml", overrides)


@pytest.mark.parametrize(
    ("hf", "tensor", "complaint"),
    [
        (hf_config(), 1, None),
        (hf_config(), 2, None),
        (hf_config(), 4, r"intermediate_size on each of serving\.tensor = 4 ranks .* found 2240"),
        (hf_config(num_attention_heads=24, num_key_value_heads=1, hidden_size=1536), 1, "k_proj"),
        (hf_config(intermediate_size=8970), 1, "intermediate_size .* found 8970"),
    ],
)
def test_models_whose_layers_are_not_whole_blocks(hf: dict[str, Any], tensor: int, complaint: str | None) -> None:
    problems = check_fp8_serving(hf, load_config("conf/torl_1.5b.yaml", [*FP8, f"serving.tensor={tensor}"]))
    assert len(problems) == (0 if complaint is None else 1), problems
    assert complaint is None or re.search(complaint, problems[0])


@pytest.mark.parametrize(
    ("tensor", "expert", "complaint"),
    [
        (2, 1, None),
        (
            4,
            1,
            r"moe_intermediate_size on each of the 4 ranks that cut an expert .* found 192; take a larger serving\.expert",
        ),
        (4, 2, None),
        (4, 4, None),
    ],
)
def test_experts_are_cut_in_whole_blocks_or_spread(tensor: int, expert: int, complaint: str | None) -> None:
    served = [*FP8, f"serving.tensor={tensor}", f"serving.expert={expert}"]
    problems = check_fp8_serving(KNOWN["Qwen3-30B-A3B-Base"], load_config("conf/moe_30b_a3b.yaml", served))
    assert len(problems) == (0 if complaint is None else 1), problems
    assert complaint is None or re.search(complaint, problems[0])


def test_server_waits_for_fp8_weights_and_cpus_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = load_config("conf/torl_1.5b.yaml", [*FP8, f"model.path={tmp_path}"])
    command = launch_command(config, host="127.0.0.1", port=1, on_gpu=True)
    override = json.loads(command[command.index("--json-model-override-args") + 1])
    assert override["quantization_config"]["weight_block_size"] == [128, 128]
    assert command[command.index("--load-format") + 1] == "dummy"
    with pytest.raises(ServerError, match="needs GPUs"):
        launch_command(config, host="127.0.0.1", port=1, on_gpu=False)


def test_programs_without_a_trainer_refuse_fp8_servers(tmp_path: Path) -> None:
    config = load_config("conf/torl_1.5b.yaml", [*FP8, f"runs_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="needs a trainer that sends the weights"):
        local.collect("eval", config, json=False)
    assert not list(tmp_path.iterdir())


def test_sink_sends_what_the_policy_rounds_to() -> None:
    torch.manual_seed(3)
    weights = {
        "model.embed_tokens.weight": torch.randn(8, 256, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.randn(256, 256, dtype=torch.bfloat16),
    }
    sent: dict[str, torch.Tensor] = {}

    class Inner:
        def update(self, tensors: Iterable[NamedTensor], *, version: int) -> dict[str, float]:
            sent.update(tensors)
            return {"version": version}

    assert Fp8Sink(Inner()).update(iter(weights.items()), version=5) == {"version": 5}
    name = "model.layers.0.mlp.up_proj.weight"
    values, scales = plain_reference(weights[name])
    assert list(sent) == ["model.embed_tokens.weight", name, f"{name}_scale_inv"]
    assert torch.equal(sent["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(sent[name].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(sent[f"{name}_scale_inv"], scales)
