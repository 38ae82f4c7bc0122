"""Chooses the modules of a transformer layer: Megatron's local ones on a CPU, Transformer Engine's on a GPU unless asked not to.

The local spec takes Megatron's own linear layers with two parts of ours: RMSNorm (Megatron's wrapper asserts against
sequence parallelism and does not mark its weight for the gradient all-reduce) and packed SDPA attention.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from torl_mega.errors import ConfigError

SpecKind = Literal["local", "te"]


def choose_spec(wanted: Literal["auto", "local"] = "auto") -> SpecKind:
    """`te` where CUDA and Transformer Engine are, `local` on a CPU or if `wanted`. Raises ConfigError on a GPU without TE."""
    if wanted == "local" or not torch.cuda.is_available():
        return "local"
    try:  # pyright: ignore[reportMissingImports] - not on every machine
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as exc:
        raise ConfigError(
            f"a GPU is there but Transformer Engine cannot be imported ({exc}); use NVIDIA's PyTorch image, "
            "take trainer.layer_spec=local, or hide the GPU with CUDA_VISIBLE_DEVICES= to train on the CPU"
        ) from None
    return "te"


class RMSNorm(torch.nn.Module):
    """RMSNorm (1910.07467) whose weight is marked for the gradient all-reduce of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def block_spec(config: TransformerConfig, kind: SpecKind, vp_stage: int | None) -> Any:
    """What GPTModel takes as `transformer_layer_spec` for one model chunk of this pipeline stage."""
    if kind == "te":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    from torl_mega.trainer.cpu.attention import SdpaCoreAttention

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer: Any = spec.submodules
    attention = layer.self_attention
    parts = dataclasses.replace(attention.submodules, core_attention=SdpaCoreAttention)
    if config.qk_layernorm:
        parts = dataclasses.replace(parts, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    names = dict(layer.sharded_state_dict_keys_map)
    if config.num_moe_experts:  # saved as what Transformer Engine does not fuse there
        names.pop("pre_mlp_layernorm.")
    layer = dataclasses.replace(
        layer,
        sharded_state_dict_keys_map=names,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(attention, submodules=parts),
    )
    spec = dataclasses.replace(spec, submodules=layer)
    norm: Any = RMSNorm  # a class, where Megatron's annotation says a module
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)
