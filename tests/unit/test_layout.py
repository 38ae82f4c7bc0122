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


QWEN_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
QWEN_MOE_27B: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_parameters_of_models_with_experts_are_those_of_the_published_ones() -> None:
    large, small = describe_model(QWEN_30B_A3B), describe_model(QWEN_MOE_27B)
    assert large.num_parameters == 30_532_122_624
    assert small.num_parameters == 14_315_784_192
    active = large.num_parameters - large.num_layers * (large.layer_matrices - large.active_matrices)
    assert active == pytest.approx(3.35e9, rel=0.001)  # "3.3B activated", says its card
    for parallel in (ParallelConfig(data=8, expert=8), ParallelConfig(tensor=2, data=4, expert=4, expert_tensor=2)):
        held = large.stage_parameters(parallel)[0]
        rest = large.num_layers * (large.attention_matrices // parallel.tensor + large.router + large.layer_norms)
        vocab = 2 * large.vocab * large.hidden // parallel.tensor + large.hidden
        assert held == rest + vocab + large.num_layers * large.expert_matrices // 8


@pytest.mark.parametrize(
    ("model", "parallel", "world", "complaint"),
    [
        (QWEN_30B_A3B, {"tensor": 4, "sequence": True, "expert": 8}, 8, None),
        (QWEN_30B_A3B, {"tensor": 4, "expert": 8}, 8, "with experts needs parallel.sequence"),
        (QWEN_30B_A3B, {"expert": 16}, 8, "16 x 1 does not divide the 8 ranks of a pipeline stage"),
        (QWEN_30B_A3B, {"expert": 4, "expert_tensor": 2, "pipeline": 2}, 8, "4 x 2 does not divide the 4 ranks"),
        (QWEN_MOE_27B, {"expert": 8}, 8, "parallel.expert = 8 does not divide the 60 experts"),
        (QWEN_MOE_27B, {"expert_tensor": 3}, 3, "does not divide moe_intermediate_size 1408"),
        (QWEN_7B, {"expert": 2}, 2, "a Qwen2ForCausalLM has no experts"),
    ],
)
def test_layouts_of_experts(model: dict[str, Any], parallel: dict[str, Any], world: int, complaint: str | None) -> None:
    found = check_layout(model, ParallelConfig(**parallel), world)
    assert found == [] if complaint is None else any(complaint in line for line in found), found


def test_tensor_size_above_the_key_value_heads() -> None:
    assert check_layout(QWEN_15B, ParallelConfig(tensor=4), 4) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "MixtralForCausalLM is not supported; supported: Qwen2ForCausalLM",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported"),
        ({"architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}, "num_experts_per_tok = 8"),
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
