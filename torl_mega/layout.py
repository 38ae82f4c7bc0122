"""What a model is, from HF's config.json, and which parallel layouts it can be trained in. Adding a model starts here.

    config.json ─► describe_model ─► ModelShape ─► trainer, planner, servers, doctor: sizes, parameters, FLOPs, KV bytes

Contract: the one place for formulas over a model's sizes. No torch, no Megatron, so `torl plan` and the launcher can
refuse a layout before a node is allocated. `describe_model` raises ConfigError for what the trainer cannot run;
`check_layout` returns every complaint at once.
Limits: decoder models, dense or with experts in every layer; layers are spread evenly over pipeline stages.

A new architecture: its name and what sets it apart here, its tensors in trainer/weights/hf_mapping.py, and what Megatron
must do differently in trainer/model.py and trainer/layer_spec.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torl_mega.config import AlgoConfig, ParallelConfig
from torl_mega.errors import ConfigError

MOE_ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM")
SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", *MOE_ARCHITECTURES)
# rope types, and the numbers that each must name
SUPPORTED_ROPE: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",),
}  # fmt: skip
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
}  # fmt: skip
# what transformers 5.19 takes where config.json is silent (configuration_qwen2.py and those of the others)
_DEFAULTS: dict[str, dict[str, int]] = {
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "Qwen3MoeForCausalLM": {
        "num_key_value_heads": 4, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "Qwen2MoeForCausalLM": {
        "num_key_value_heads": 16, "intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Experts:
    """What stands in the place of every layer's MLP: a router, experts of which it takes `top_k` per token, and maybe one that
    every token goes through, weighed by a gate."""

    count: int
    top_k: int
    ffn: int  # width of one expert
    shared_ffn: int  # of the shared expert, 0 without
    normalized: bool  # the chosen experts' probabilities are divided by their sum


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder: its sizes in elements, and what follows from them."""

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
    experts: Experts | None = None

    @property
    def q_width(self) -> int:
        """Of all query heads together: the rows of q_proj and the columns of o_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of all key (or value) heads together: the rows of k_proj and of v_proj."""
        return self.num_kv_groups * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Parameters of one layer's q, k, v, o."""
        return self.hidden * (2 * self.q_width + 2 * self.kv_width)

    @property
    def expert_matrices(self) -> int:
        """Parameters of gate, up, down of one layer's experts together, the shared one aside; 0 in a dense model."""
        return 3 * self.hidden * self.experts.ffn * self.experts.count if self.experts else 0

    @property
    def shared_matrices(self) -> int:
        """Parameters of the gate, up, down that every token goes through: the MLP of a dense model, the shared expert."""
        return 3 * self.hidden * (self.experts.shared_ffn if self.experts else self.ffn)

    @property
    def router(self) -> int:
        """Parameters of one layer's router and of the shared expert's gate; every rank holds them whole."""
        return self.hidden * (self.experts.count + (self.experts.shared_ffn > 0)) if self.experts else 0

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices: q, k, v, o and gate, up, down of all experts, router."""
        return self.attention_matrices + self.shared_matrices + self.expert_matrices + self.router

    @property
    def active_matrices(self) -> int:
        """Parameters of one layer's matrices that a token is multiplied with."""
        chosen = self.expert_matrices // self.experts.count * self.experts.top_k if self.experts else 0
        return self.attention_matrices + self.shared_matrices + chosen + self.router

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
        cut = (self.attention_matrices + self.shared_matrices + self.layer_biases) // tp
        experts = self.expert_matrices // (parallel.expert * parallel.expert_tensor)
        layers = self.num_layers // pp * (cut + experts + self.router + self.layer_norms)
        embedding = padded_vocab(self.vocab, tp) * self.hidden // tp
        held = [layers] * pp
        held[0] += embedding
        held[-1] += self.hidden + (0 if self.tied and pp == 1 else embedding)
        return held

    def stage_expert_parameters(self, parallel: ParallelConfig) -> int:
        """Of those, parameters of experts: copies of them lie on other ranks than copies of the rest."""
        return self.num_layers // parallel.pipeline * self.expert_matrices // (parallel.expert * parallel.expert_tensor)

    @property
    def quadratic_at(self) -> float:
        """Sequence length in tokens at which causal attention costs as much as the matrices of a layer."""
        return self.active_matrices / self.q_width

    def forward_flops(self, tokens: float, mean_length: float) -> float:
        """FLOPs of a forward pass over `tokens` in sequences of `mean_length` tokens: two per token and parameter of the
        layers and the head that it meets (the embedding is a lookup); causal attention is half of the square."""
        matmul_params = self.num_layers * self.active_matrices + self.vocab * self.hidden
        attention = 2 * self.num_layers * self.q_width * mean_length
        return tokens * (2 * matmul_params + attention)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that the KV cache of all layers takes per token of context."""
        return 2 * self.num_layers * self.kv_width * dtype_bytes


def _hub_hint(folder: Path) -> str:
    """A path of two words that is not there is likely a model's name on a hub."""
    two_words = not folder.is_absolute() and len(folder.parts) == 2 and not folder.parent.exists()
    return f"; `hf download {folder} --local-dir DIR` fetches that model into one" if two_words else ""


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of an HF folder. Raises ConfigError when the folder or the file is missing or not JSON."""
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(
            f"model.path = {folder} is no folder; it must hold an HF checkpoint (config.json, safetensors)"
            + _hub_hint(folder)
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
        # transformers writes either name
        count = {"num_experts": hf["num_local_experts"]} if "num_local_experts" in hf else {}
        hf = {"max_position_embeddings": 32768, **_DEFAULTS[name], **count, **hf}
        hidden, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
        rope = _rope(hf)
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
            qkv_bias=name == "Qwen2ForCausalLM" or (name == "Qwen2MoeForCausalLM" and bool(hf.get("qkv_bias", True))),
            qk_norm=name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_positions=int(hf["max_position_embeddings"]),
            rope_theta=float(rope["rope_theta"]),
            rope=rope,
            experts=_experts(hf, name) if name in MOE_ARCHITECTURES else None,
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"config.json of a {name} is incomplete or malformed: {exc!r}") from None
    if shape.num_heads % shape.num_kv_groups:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {shape.num_kv_groups}")
    return shape


def _experts(hf: Mapping[str, Any], name: str) -> Experts:
    """Raises ConfigError for layers without experts, and for a router that takes more experts than there are."""
    count, top_k, step = int(hf["num_experts"]), int(hf["num_experts_per_tok"]), int(hf.get("decoder_sparse_step", 1))
    if step != 1 or hf.get("mlp_only_layers"):
        raise ConfigError(
            f"decoder_sparse_step = {step}, mlp_only_layers = {hf.get('mlp_only_layers') or []} is not supported; expected 1 and "
            "[]: experts in every layer"
        )
    if not 1 <= top_k <= count:
        raise ConfigError(f"num_experts_per_tok = {top_k} is not supported; expected 1 to num_experts = {count}")
    shared = int(hf["shared_expert_intermediate_size"]) if name == "Qwen2MoeForCausalLM" else 0
    return Experts(count, top_k, int(hf["moe_intermediate_size"]), shared, bool(hf.get("norm_topk_prob", False)))


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings as transformers 5.19 reads them (modeling_rope_utils.py, RotaryEmbeddingConfigMixin) and SGLang
    after it. Raises ConfigError for what one of them would read differently."""
    found = [_standard(hf[key], hf) for key in ("rope_scaling", "rope_parameters") if hf.get(key)]
    rope = found[0] if found else _standard({}, hf)
    if found[1:] and found[1] != rope:
        raise ConfigError(
            "config.json has rope_scaling and rope_parameters, and they differ; transformers and SGLang would drop the "
            f"second with its rope_theta {found[1]['rope_theta']}: merge them into rope_parameters"
        )
    kind = rope["rope_type"]
    if kind not in SUPPORTED_ROPE:
        raise ConfigError(f"rope type {kind} is not supported; supported: {', '.join(SUPPORTED_ROPE)}")
    if unknown := sorted(rope.keys() - _ROPE_KEYS):
        raise ConfigError(f"rope setting {unknown[0]} is not supported; supported: {', '.join(sorted(_ROPE_KEYS))}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor = {rope['partial_rotary_factor']} is not supported; expected 1.0")
    for key in SUPPORTED_ROPE[kind]:
        if not isinstance(rope.get(key), int | float):
            raise ConfigError(f"rope type {kind} with {key} = {rope.get(key)}: expected a number in config.json")
    return rope


def _standard(raw: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """One of the two forms with what stands beside it in config.json filled in."""
    rope = dict(raw)
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    return rope


def _refuse_variants(hf: Mapping[str, Any], name: str) -> None:
    if hf.get("use_sliding_window"):
        raise ConfigError("use_sliding_window = true is not supported; the trainer attends to the whole context")
    if hf.get("mlp_bias") or (hf.get("attention_bias") and name != "Qwen2ForCausalLM"):
        raise ConfigError("attention_bias / mlp_bias outside of Qwen2's q, k, v is not supported; expected false")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act = {hf['hidden_act']} is not supported; expected silu")
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
    problems += _expert_problems(shape, parallel, world_size)
    if shape.num_layers % (pp * vpp):
        problems.append(
            f"parallel.pipeline x virtual_pipeline = {pp} x {vpp} does not divide the {shape.num_layers} layers"
        )
    return problems


def check_served_experts(hf_config: Mapping[str, Any], tensor: int, expert: int) -> list[str]:
    """What stands against `serving.expert` = `expert` in servers of `tensor` ranks."""
    shape = describe_model(hf_config)
    if expert == 1:
        return []
    if shape.experts is None:
        return [f"serving.expert = {expert}: a {shape.architecture} has no experts; take 1"]
    if tensor % expert or shape.experts.count % expert:
        return [
            f"serving.expert = {expert} does not divide serving.tensor = {tensor} and the model's {shape.experts.count} "
            "experts; take a number that divides both"
        ]
    return []


def check_router_settings(hf_config: Mapping[str, Any], algo: AlgoConfig) -> list[str]:
    """What stands against the settings of routers."""
    shape, problems = describe_model(hf_config), []
    if shape.experts is None and algo.router_replay != "off":
        problems.append(f"algo.router_replay = {algo.router_replay}: a {shape.architecture} has no experts; take off")
    if shape.experts is None and algo.router_aux_coef:
        problems.append(f"algo.router_aux_coef = {algo.router_aux_coef}: a {shape.architecture} has no experts; take 0")
    return problems


def _expert_problems(shape: ModelShape, parallel: ParallelConfig, world_size: int) -> list[str]:
    """What stands against this layout in the MLPs."""
    tp, ep, etp, experts = parallel.tensor, parallel.expert, parallel.expert_tensor, shape.experts
    if experts is None:
        problems = (
            [] if shape.ffn % tp == 0 else [f"parallel.tensor = {tp} does not divide intermediate_size {shape.ffn}"]
        )
        if ep > 1 or etp > 1:
            problems.append(
                f"parallel.expert x expert_tensor = {ep} x {etp}: a {shape.architecture} has no experts; take 1 and 1"
            )
        return problems
    problems = []
    if world_size % (parallel.pipeline * ep * etp):
        problems.append(
            f"parallel.expert x expert_tensor = {ep} x {etp} does not divide the {world_size / parallel.pipeline:g} ranks of a "
            "pipeline stage"
        )
    if experts.count % ep:
        problems.append(f"parallel.expert = {ep} does not divide the {experts.count} experts")
    if experts.ffn % etp:
        problems.append(f"parallel.expert_tensor = {etp} does not divide moe_intermediate_size {experts.ffn}")
    if experts.shared_ffn % tp:
        problems.append(f"parallel.tensor = {tp} does not divide shared_expert_intermediate_size {experts.shared_ffn}")
    if tp > 1 and not parallel.sequence:
        problems.append(f"parallel.tensor = {tp} with experts needs parallel.sequence = true")
    return problems


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of the embedding: `vocab` up to the next multiple of the tensor size (Qwen's and Llama's are one of 1, 2, 4, 8)."""
    return -(-vocab // tensor) * tensor


def layer_owner(layer: int, num_layers: int, pipeline: int, virtual_pipeline: int) -> tuple[int, int, int]:
    """(pipeline stage, model chunk, index within the chunk) that holds a layer under Megatron's interleaved order."""
    per_chunk = num_layers // (pipeline * virtual_pipeline)
    block, index = divmod(layer, per_chunk)
    return block % pipeline, block // pipeline, index
