"""How servers are told of block-wise FP8 weights, and which models can be served so. No torch: the launcher asks too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torl_mega.config import Config
from torl_mega.layout import ModelShape, describe_model

BLOCK = 128

QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
}
"""`quantization_config` of a server's model, as in DeepSeek-V3's checkpoints."""


def check_fp8_serving(hf_config: Mapping[str, Any], config: Config) -> list[str]:
    """Every reason why servers of this model cannot hold `serving.weight_dtype`; empty when they can. Raises ConfigError
    for a model that the trainer does not know."""
    if config.serving.weight_dtype == "model":
        return []
    tensor, shape = config.serving.tensor, describe_model(hf_config)
    problems = [
        f"serving.weight_dtype = fp8_block needs {what} on each of serving.tensor = {tensor} ranks to be a multiple of "
        f"{BLOCK}, found {size / tensor:g}; take a smaller serving.tensor or weight_dtype = model"
        for what, size in _sharded_sizes(shape, tensor).items()
        if size % (BLOCK * tensor)
    ]
    cut = tensor // config.serving.expert  # ranks that cut an expert (Fp8MoEMethod.create_fp8_moe_weight_)
    if shape.experts is not None and shape.experts.ffn % (BLOCK * cut):
        problems.append(
            f"serving.weight_dtype = fp8_block needs moe_intermediate_size on each of the {cut} ranks that cut an expert to be a "
            f"multiple of {BLOCK}, found {shape.experts.ffn / cut:g}; take a larger serving.expert, a smaller serving.tensor or "
            "weight_dtype = model"
        )
    return problems


def _sharded_sizes(shape: ModelShape, tensor: int) -> dict[str, int]:
    """Sizes that SGLang fuses or shards in whole blocks (Fp8LinearMethod.validate_block_quant_shapes, 0.5.23)."""
    return {
        "the rows of q_proj": shape.q_width,
        "the rows of k_proj": max(shape.num_kv_groups, tensor) * shape.head_dim,  # heads repeat above their number
        **({"intermediate_size": shape.ffn} if shape.experts is None else {}),
        **({"shared_expert_intermediate_size": shape.experts.shared_ffn} if shape.experts else {}),
    }
