"""A tiny random Qwen2 with a byte-level tokenizer in Qwen2's own format, so AutoTokenizer reproduces it anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 512


def make_tiny_model(folder: Path, *, seed: int = 0, num_kv_heads: int = 2, tied: bool = False, **sizes: int) -> Path:
    """Writes config.json, tokenizer and model.safetensors (fp32, 0.14M parameters unless `sizes` say more)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    eos = _write_tokenizer(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, **sizes}
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=num_kv_heads,
        max_position_embeddings=2048, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=eos, pad_token_id=eos,
        dtype="float32",
    )  # fmt: skip
    torch.manual_seed(seed)
    return _write(Qwen2ForCausalLM(config), folder, eos)


def make_tiny_moe(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    experts: int = 8,
    ffn: int = 32,
    hidden: int = 64,
    head_dim: int = 32,
) -> Path:
    """The same with experts, of which each token takes two: a Qwen3-MoE."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    eos = _write_tokenizer(folder)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden, intermediate_size=128, moe_intermediate_size=ffn, num_experts=experts,
        num_experts_per_tok=2, norm_topk_prob=True, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None, eos_token_id=eos,
        pad_token_id=eos, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(seed)
    return _write(Qwen3MoeForCausalLM(config), folder, eos)


def make_tiny_qwen2_moe(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2-MoE: a shared expert with its gate beside eight others, whose weights are not divided by their sum."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    eos = _write_tokenizer(folder)
    config = Qwen2MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2, shared_expert_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None, eos_token_id=eos,
        pad_token_id=eos, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(seed)
    return _write(Qwen2MoeForCausalLM(config), folder, eos)


def _write_tokenizer(folder: Path) -> int:
    """Returns the id of the end token."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("`", "`"), ("``", "`"), ("Ċ", "```"), ("o", "u"), ("t", "p"), ("ou", "tp"), ("u", "t"), ("outp", "ut")]
    vocab = {word: index for index, word in enumerate([*words, *("".join(m) for m in merges)])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer.eos_token_id


def _write(model: Any, folder: Path, eos: int) -> Path:
    """Larger weights than at the start of training, so that no token is like another."""
    model = model.to(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(3) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) * 0.1)
            assert torch.isfinite(weight).all(), name
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "pad_token_id": eos}))
    return folder
