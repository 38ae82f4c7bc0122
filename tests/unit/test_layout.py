"""Model and layout checks: what does not fit is refused by name, without torch or Megatron."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from torl_mega.config import ParallelConfig
from torl_mega.errors import ConfigError
from torl_mega.layout import check_layout, describe_model, layer_owner, read_hf_config

QWEN_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 4096, "hidden_act": "silu",
}  # fmt: skip
QWEN_15B = QWEN_7B | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


def test_parameter_counts_are_those_of_the_published_models() -> None:
    assert describe_model(QWEN_7B).num_parameters == 7_615_616_512
    assert describe_model(QWEN_15B).num_parameters == 1_543_714_304


@pytest.mark.parametrize(
    ("parallel", "world", "complaint"),
    [
        ({"tensor": 4, "pipeline": 2}, 8, None),
        ({"tensor": 2}, 3, "3 trainer ranks cannot be cut"),
        ({"tensor": 8}, 8, "does not divide the 28 attention heads"),
        ({"pipeline": 8}, 8, "does not divide the 28 layers"),
        ({"pipeline": 4, "virtual_pipeline": 2}, 4, "4 x 2 does not divide the 28 layers"),
        ({"tensor": 2, "data": 4}, 4, "take 2 or auto"),
        ({"tensor": 7}, 7, "no multiple of the 4 key/value heads"),
    ],
)
def test_layouts(parallel: dict[str, Any], world: int, complaint: str | None) -> None:
    found = check_layout(QWEN_7B, ParallelConfig(**parallel), world)
    if complaint is None:
        assert found == []
    else:
        assert any(complaint in line for line in found), found
        assert all("\n" not in line for line in found)


def test_tensor_size_above_the_key_value_heads() -> None:
    assert check_layout(QWEN_15B, ParallelConfig(tensor=4), 4) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"architectures": ["Qwen2MoeForCausalLM"]},
            "Qwen2MoeForCausalLM is not supported; supported: Qwen2ForCausalLM",
        ),
        ({"architectures": None}, "architecture unknown is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            "rope type dynamic is not supported; supported: default",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_size": None}, "incomplete or malformed"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    ],
)
def test_unsupported_models_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe_model(QWEN_7B | change)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_config(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_hf_config(tmp_path)


def test_every_layer_has_one_owner() -> None:
    owners = [layer_owner(i, 16, 4, 2) for i in range(16)]
    assert len(set(owners)) == 16
    assert owners[:4] == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    assert owners[8] == (0, 1, 0)


def test_layout_imports_no_torch() -> None:
    code = "import sys, torl_mega.layout; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
