"""Published models known by name, so that a run can be planned before its weights have been downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torl_mega.errors import ConfigError
from torl_mega.layout import read_hf_config

_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rope_theta": 1e6}

# The fields of the published config.json files that size a model.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen2.5-Math-1.5B": _QWEN2 | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 4096,
    },
    "Qwen2.5-Math-7B": _QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    },
    "Qwen2.5-32B": _QWEN2 | {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
    "Qwen3-30B-A3B-Base": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "rope_theta": 1e6,
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


def hf_config(path: str) -> dict[str, Any]:
    """config.json of the HF folder `path`, or the built-in one when the folder is absent and its name is known."""
    if not Path(path).exists():
        name = Path(path).name
        if name not in KNOWN:
            raise ConfigError(
                f"model.path = {path} is not there; download the model, or name one known by name: {', '.join(KNOWN)}"
            )
        return KNOWN[name]
    return read_hf_config(path)
