"""Sizes that follow from a model's shape: parameters per pipeline stage, FLOPs and KV bytes per token. No torch.

The shape itself is `trainer.layout.ModelShape`, read from the HF folder's config.json. Three published models are
known by name, so that a run can be planned before its weights have been downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torl_mega import layout
from torl_mega.config import ParallelConfig
from torl_mega.errors import ConfigError
from torl_mega.layout import ModelShape, padded_vocab

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
    return layout.read_hf_config(path)


def attention_params(shape: ModelShape) -> int:
    """Of one layer's matrices: q, k, v, o."""
    return shape.hidden * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_groups)


def mlp_params(shape: ModelShape) -> int:
    return 3 * shape.hidden * shape.ffn


def small_params(shape: ModelShape) -> int:
    """Of one layer's replicated vectors: norms. Biases of q, k, v are cut with their matrix."""
    return 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)


def bias_params(shape: ModelShape) -> int:
    return shape.head_dim * (shape.num_heads + 2 * shape.num_kv_groups) if shape.qkv_bias else 0


def matmul_params(shape: ModelShape) -> int:
    """Parameters every token is multiplied with: the layers and the output head, not the embedding lookup."""
    return shape.num_layers * (attention_params(shape) + mlp_params(shape)) + shape.vocab * shape.hidden


def forward_flops(shape: ModelShape, tokens: float, mean_length: float) -> float:
    """FLOPs of a forward pass over `tokens` in sequences of `mean_length`; causal attention is half of the square."""
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * mean_length
    return tokens * (2 * matmul_params(shape) + attention)


def kv_bytes_per_token(shape: ModelShape, dtype_bytes: int) -> int:
    return 2 * shape.num_layers * shape.num_kv_groups * shape.head_dim * dtype_bytes


@dataclass(frozen=True, slots=True)
class StageParams:
    """Parameters one rank of a pipeline stage holds."""

    stage: int
    layers: int
    total: int


def stage_params(shape: ModelShape, parallel: ParallelConfig) -> list[StageParams]:
    """Per pipeline stage, on one tensor rank. The embedding is on the first stage, the head on the last; a tied head
    is the same storage on one stage and a second copy on two. Norm weights are on every tensor rank."""
    tp, pp = parallel.tensor, parallel.pipeline
    cut = attention_params(shape) + mlp_params(shape) + bias_params(shape)
    layers = shape.num_layers // pp
    embedding = padded_vocab(shape.vocab, tp) * shape.hidden // tp
    found = []
    for stage in range(pp):
        total = layers * (cut // tp + small_params(shape))
        total += embedding if stage == 0 else 0
        if stage == pp - 1:
            total += shape.hidden + (0 if shape.tied and pp == 1 else embedding)
        found.append(StageParams(stage, layers, total))
    return found
