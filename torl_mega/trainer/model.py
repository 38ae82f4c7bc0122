"""Builds Megatron's TransformerConfig and this rank's GPTModel chunks from a ModelShape.

Contract: the local and the Transformer Engine paths differ only in `layer_spec.block_spec` and in the fusion flags here.
Rotary frequencies are computed by HF's formulas (transformers.modeling_rope_utils) and put into Megatron's module, so
`rope_scaling` means exactly what it means in `transformers`.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from torl_mega.config import ParallelConfig, TrainerConfig
from torl_mega.layout import ModelShape, padded_vocab
from torl_mega.trainer import router
from torl_mega.trainer.layer_spec import SpecKind, block_spec
from torl_mega.trainer.precision import precision_settings
from torl_mega.trainer.vocab_parallel import defer_projection


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, trainer: TrainerConfig, dtype: torch.dtype, kind: SpecKind
) -> TransformerConfig:
    """Megatron's settings for this model: every choice that differs from the defaults, with its reason."""
    fused = kind == "te"
    yarn = shape.rope["rope_type"] == "yarn"
    settings: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_groups,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": fused,  # these fusions are torch.compile or CUDA kernels
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": fused and not yarn,  # the fused kernel leaves out yarn's concentration factor
        "gradient_accumulation_fusion": fused and _has_fused_wgrad(),
        "use_cpu_initialization": not fused,
        # 0.16.1 loses `tensor_model_parallel` on weights when False, and the gradient norm is wrong with tensor > 1
        "perform_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        "variable_seq_lengths": parallel.pipeline > 1,  # micro-batches of different length through the pipe
        "moe_token_dispatcher_type": "alltoall",  # in a dense model too: the default is refused with variable_seq_lengths (0.16.1)
        "calculate_per_token_loss": True,  # read by DDP's constructor: gradients are sums, nothing is divided by ranks
        # with two stages both neighbours are the same rank: the interleaved schedule needs one group per direction
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        # frees what was handed to an asynchronous send: CUDA's stream order makes that safe, gloo has none
        "deallocate_pipeline_outputs": fused,
        "attention_backend": _attention_backend(),
        "deterministic_mode": fused and trainer.deterministic,  # the local layers repeat as they are
        **_experts(shape, parallel, fused),
        **_recompute(trainer),
        **precision_settings(trainer.precision, dtype),
    }
    config = TransformerConfig(**settings)
    if yarn:
        _set_yarn_factor(config, shape)
    return config


def _experts(shape: ModelShape, parallel: ParallelConfig, fused: bool) -> dict[str, Any]:
    """Settings of a model with experts. Choosing experts and balancing them is `router`'s."""
    if shape.experts is None:
        return {}
    return {
        "num_moe_experts": shape.experts.count,
        "moe_router_topk": shape.experts.top_k,
        "moe_ffn_hidden_size": shape.experts.ffn,
        "moe_shared_expert_intermediate_size": shape.experts.shared_ffn or None,
        "moe_shared_expert_gate": shape.experts.shared_ffn > 0,
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": fused,  # one kernel for all experts of a rank; the local layers run one after the other
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _attention_backend() -> Any:
    """Transformer Engine chooses among the kernels it has."""
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend.auto


def _has_fused_wgrad() -> bool:
    """Whether apex's kernel that adds a weight's gradient to its buffer is there."""
    try:  # pyright: ignore[reportMissingImports] - not on every machine
        importlib.import_module("fused_weight_gradient_mlp_cuda")  # part of apex as NVIDIA's image ships it
    except ImportError:
        return False
    return True


def _recompute(trainer: TrainerConfig) -> dict[str, Any]:
    if trainer.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if trainer.recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {}


def build_chunks(
    shape: ModelShape, config: TransformerConfig, parallel: ParallelConfig, kind: SpecKind, *, fp32_router: bool = True
) -> list[GPTModel]:
    """The GPTModel chunks of this pipeline stage (one without a virtual pipeline), heads deferred to the loss."""
    chunks = []
    for stage in range(parallel.virtual_pipeline):
        vp_stage = stage if parallel.virtual_pipeline > 1 else None
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, kind, vp_stage),
            vocab_size=padded_vocab(shape.vocab, parallel.tensor),
            max_sequence_length=shape.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_percent=1.0,
            rotary_base=int(shape.rope_theta),
            vp_stage=vp_stage,
        )
        model.rotary_pos_emb.inv_freq = rope_frequencies(shape)  # in place of those of rotary_base
        defer_projection(model)
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        chunks.append(model)
    if shape.experts is not None:
        router.install(chunks, shape.experts, fp32=fp32_router)
        _mark_experts(chunks)
    return chunks


def _mark_experts(chunks: list[GPTModel]) -> None:
    """The gradients of experts are summed over the ranks that hold the same ones. Megatron marks them so only where experts are
    spread; without, and with fewer expert-tensor than tensor ranks, each tensor rank would keep the gradient of its own tokens."""
    layers: list[Any] = [layer for chunk in chunks for layer in chunk.decoder.layers]
    for parameter in (p for layer in layers for p in layer.mlp.experts.parameters()):
        parameter.allreduce = False


# ------------------------------------------------------------------------------------------------ rotary embedding


def rope_frequencies(shape: ModelShape) -> torch.Tensor:
    """[head_dim / 2] fp32 inverse frequencies under the model's rope type."""
    dim, base, rope = shape.head_dim, shape.rope_theta, shape.rope
    plain = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    kind = rope["rope_type"]
    if kind == "linear":
        return plain / float(rope["factor"])
    if kind == "llama3":
        return _llama3(plain, rope)
    if kind == "yarn":
        return _yarn(plain, shape)
    return plain


def _llama3(plain: torch.Tensor, rope: Any) -> torch.Tensor:
    """Llama 3.1's: long wavelengths divided by the factor, short ones kept, a smooth ramp between."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > context / low, plain / factor, plain)
    smooth = (context / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(medium, smoothed, scaled)


def _yarn(plain: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """YaRN (2309.00071): low frequencies divided by the factor, high ones kept, a linear ramp between."""
    rope, dim, base = shape.rope, shape.head_dim, shape.rope_theta
    context = float(rope.get("original_max_position_embeddings") or shape.max_positions)
    factor = float(rope["factor"])

    def correction(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(float(rope.get("beta_fast") or 32)), correction(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return (plain / factor) * (1 - keep) + plain * keep


def _set_yarn_factor(config: Any, shape: ModelShape) -> None:
    """Makes Megatron scale cos and sin by HF's `attention_factor`; Megatron computes the scale from these attributes."""
    rope = shape.rope
    config.yarn_rotary_scaling_factor = float(rope["factor"])
    config.yarn_mscale, config.yarn_mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    wanted = rope.get("attention_factor")
    if wanted is not None:
        # Megatron's scale is (0.1 * mscale * ln(factor) + 1) / (the same of mscale_all_dim): solved for mscale
        scale = float(rope["factor"])
        config.yarn_mscale = (float(wanted) - 1.0) / (0.1 * math.log(scale)) if scale > 1 else 1.0
        config.yarn_mscale_all_dim = 0.0
