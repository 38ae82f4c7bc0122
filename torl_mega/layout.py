"""What a model is, from HF's config.json, and which parallel layouts it can be trained in. Adding a model starts here.

    config.json ─► describe_model ─► ModelShape ─► trainer, planner, servers, doctor: sizes, parameters, FLOPs, KV bytes

Contract: the one place for formulas over a model's sizes. No torch, no Megatron, so `torl plan` and the launcher can
refuse a layout before a node is allocated. `describe_model` raises ConfigError for what the trainer cannot run;
`check_layout` returns every complaint at once.
Limits: dense decoder models only; layers are spread evenly over pipeline stages.

A new architecture: its name and what sets it apart here, its tensors in trainer/weights/hf_mapping.py, and what Megatron
must do differently in trainer/model.py and trainer/layer_spec.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torl_mega.config import ParallelConfig
from torl_mega.errors import ConfigError

SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder: its sizes in elements, and what follows from them."""

    architecture: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_groups: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    max_positions: int
    rope_theta: float
    rope: Mapping[str, Any]  # HF's rope_scaling / rope_parameters, {"rope_type": "default"} when absent

    @property
    def q_width(self) -> int:
        """Of all query heads together: the rows of q_proj and the columns of o_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of all key (or value) heads together: the rows of k_proj and of v_proj."""
        return self.num_kv_groups * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices: q, k, v, o and gate, up, down."""
        return self.hidden * (2 * self.q_width + 2 * self.kv_width) + 3 * self.hidden * self.ffn

    @property
    def layer_biases(self) -> int:
        """Parameters of one layer's q, k, v biases; tensor parallelism cuts them with their matrix."""
        return (self.q_width + 2 * self.kv_width) * self.qkv_bias

    @property
    def layer_norms(self) -> int:
        """Parameters of one layer's norms; every tensor rank holds them whole."""
        return 2 * self.hidden + 2 * self.head_dim * self.qk_norm

    @property
    def num_parameters(self) -> int:
        """Stored parameters (a tied head counts once)."""
        layer = self.layer_matrices + self.layer_biases + self.layer_norms
        return self.num_layers * layer + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    def stage_parameters(self, parallel: ParallelConfig) -> list[int]:
        """Parameters that one tensor rank of each pipeline stage holds. The embedding is on the first stage, the head on
        the last; a tied head is the same storage on one stage and a second copy on several."""
        tp, pp = parallel.tensor, parallel.pipeline
        layers = self.num_layers // pp * ((self.layer_matrices + self.layer_biases) // tp + self.layer_norms)
        embedding = padded_vocab(self.vocab, tp) * self.hidden // tp
        held = [layers] * pp
        held[0] += embedding
        held[-1] += self.hidden + (0 if self.tied and pp == 1 else embedding)
        return held

    @property
    def quadratic_at(self) -> float:
        """Sequence length in tokens at which causal attention costs as much as the matrices of a layer."""
        return self.layer_matrices / self.q_width

    def forward_flops(self, tokens: float, mean_length: float) -> float:
        """FLOPs of a forward pass over `tokens` in sequences of `mean_length` tokens: two per token and parameter of the
        layers and the head (the embedding is a lookup); causal attention is half of the square."""
        matmul_params = self.num_layers * self.layer_matrices + self.vocab * self.hidden
        attention = 2 * self.num_layers * self.q_width * mean_length
        return tokens * (2 * matmul_params + attention)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that the KV cache of all layers takes per token of context."""
        return 2 * self.num_layers * self.kv_width * dtype_bytes


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of an HF folder. Raises ConfigError when the folder or the file is missing or not JSON."""
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(
            f"model.path = {folder} is no folder; it must hold an HF checkpoint (config.json, safetensors)"
        )
    if not file.is_file():
        raise ConfigError(f"model.path = {folder} has no config.json; it must hold an HF checkpoint")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as exc:
        raise ConfigError(f"{file} is not JSON: {exc}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def describe_model(hf: Mapping[str, Any]) -> ModelShape:
    """HF's config.json -> ModelShape. Raises ConfigError naming what is not supported and what is."""
    names = hf.get("architectures") or []
    if len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"model architecture {', '.join(map(str, names)) or 'unknown'} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    name = names[0]
    _refuse_variants(hf, name)
    try:
        hidden, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        rope.setdefault("rope_type", rope.get("type", "default"))
        shape = ModelShape(
            architecture=name,
            num_layers=int(hf["num_hidden_layers"]),
            hidden=hidden,
            num_heads=heads,
            num_kv_groups=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or hidden // heads),
            ffn=int(hf["intermediate_size"]),
            vocab=int(hf["vocab_size"]),
            tied=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=name == "Qwen2ForCausalLM",
            qk_norm=name == "Qwen3ForCausalLM",
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_positions=int(hf.get("max_position_embeddings", 32768)),
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rope=rope,
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"config.json of a {name} is incomplete or malformed: {exc!r}") from None
    if rope["rope_type"] not in SUPPORTED_ROPE:
        raise ConfigError(f"rope type {rope['rope_type']} is not supported; supported: {', '.join(SUPPORTED_ROPE)}")
    if shape.num_heads % shape.num_kv_groups:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {shape.num_kv_groups}")
    return shape


def _refuse_variants(hf: Mapping[str, Any], name: str) -> None:
    if hf.get("use_sliding_window"):
        raise ConfigError("use_sliding_window = true is not supported; the trainer attends to the whole context")
    if hf.get("mlp_bias") or (hf.get("attention_bias") and name != "Qwen2ForCausalLM"):
        raise ConfigError("attention_bias / mlp_bias outside of Qwen2's q, k, v is not supported; expected false")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act = {hf['hidden_act']} is not supported; expected silu")
    if hf.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor = {hf['partial_rotary_factor']} is not supported; expected 1.0")
    if hf.get("quantization_config"):
        raise ConfigError("the checkpoint is quantised (quantization_config); train from its unquantised original")


def check_layout(hf_config: Mapping[str, Any], parallel: ParallelConfig, world_size: int) -> list[str]:
    """Every reason why this model cannot be trained in this layout on `world_size` ranks; empty when it can."""
    try:
        shape = describe_model(hf_config)
    except ConfigError as exc:
        return [str(exc)]
    tp, pp, vpp = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    problems = []
    if world_size % parallel.model_size:
        problems.append(
            f"{world_size} trainer ranks cannot be cut into tensor {tp} x pipeline {pp} x context {parallel.context} "
            f"= {parallel.model_size}; take a multiple of {parallel.model_size}"
        )
    elif parallel.data != "auto" and parallel.data * parallel.model_size != world_size:
        problems.append(
            f"parallel.data = {parallel.data} x model size {parallel.model_size} is not the {world_size} trainer ranks; "
            f"take {world_size // parallel.model_size} or auto"
        )
    if shape.num_heads % tp:
        problems.append(f"parallel.tensor = {tp} does not divide the {shape.num_heads} attention heads")
    if tp < shape.num_kv_groups and shape.num_kv_groups % tp:
        problems.append(f"parallel.tensor = {tp} does not divide the {shape.num_kv_groups} key/value heads")
    if tp > shape.num_kv_groups and tp % shape.num_kv_groups:
        problems.append(f"parallel.tensor = {tp} is no multiple of the {shape.num_kv_groups} key/value heads")
    if shape.ffn % tp:
        problems.append(f"parallel.tensor = {tp} does not divide intermediate_size {shape.ffn}")
    if shape.num_layers % (pp * vpp):
        problems.append(
            f"parallel.pipeline x virtual_pipeline = {pp} x {vpp} does not divide the {shape.num_layers} layers"
        )
    return problems


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of the embedding: `vocab` up to the next multiple of the tensor size (Qwen's and Llama's are one of 1, 2, 4, 8)."""
    return -(-vocab // tensor) * tensor


def layer_owner(layer: int, num_layers: int, pipeline: int, virtual_pipeline: int) -> tuple[int, int, int]:
    """(pipeline stage, model chunk, index within the chunk) that holds a layer under Megatron's interleaved order."""
    per_chunk = num_layers // (pipeline * virtual_pipeline)
    block, index = divmod(layer, per_chunk)
    return block % pipeline, block // pipeline, index
