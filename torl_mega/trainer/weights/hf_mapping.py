"""HF names and tensors <-> Megatron names and tensor-parallel shards: one table, read both ways.

    kind         Megatron holds on tensor rank r of n                              HF side
    whole        the tensor itself                                                 one tensor
    rows         rows r of n of the tensor padded to V rows (embedding, head)      one tensor
    columns      columns r of n (o_proj, down_proj)                                one tensor
    qkv          rows r of n of [per key/value group: its queries, its k, its v]   q, k, v
    gate_up      [gate_r; up_r]                                                    gate, up

An expert's matrices are cut over the ranks of `parallel.expert_tensor`, all others over those of `parallel.tensor`; which
ranks hold an expert at all, reshard.py knows.

Pure tensor functions; nothing here knows of ranks' processes. A rule has local and Transformer Engine names, which differ
where TE fuses a norm into the linear layer after it, and for experts: local ones are modules of their own, TE's are weights
of one grouped layer. The order of the table is the order of `weights()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from torl_mega.layout import ModelShape

Kind = Literal["whole", "rows", "columns", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table."""

    hf: tuple[str, ...]
    megatron: str
    kind: Kind
    te: str | None = None  # the name under Transformer Engine where it differs
    expert: int | None = None  # of which of the layer's experts

    def name(self, te: bool, local_expert: int = 0) -> str:
        """Megatron's name under the local (False) or Transformer Engine's layers; `local_expert`: its number on its rank."""
        name = self.te if te and self.te else self.megatron
        return name if self.expert is None else name.format(local_expert)


_ATTENTION, _MLP = "self_attention.", "mlp."
_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")

EMBEDDING = Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", "rows")
FINAL_NORM = Rule(("model.norm.weight",), "decoder.final_layernorm.weight", "whole")
HEAD = Rule(("lm_head.weight",), "output_layer.weight", "rows")

_ATTENTION_WEIGHTS = (
    Rule(tuple(n.format("weight") for n in _QKV), _ATTENTION + "linear_qkv.weight", "qkv"),
    Rule(("self_attn.o_proj.weight",), _ATTENTION + "linear_proj.weight", "columns"),
)
_DENSE = (
    Rule(("mlp.gate_proj.weight", "mlp.up_proj.weight"), _MLP + "linear_fc1.weight", "gate_up"),
    Rule(("mlp.down_proj.weight",), _MLP + "linear_fc2.weight", "columns"),
)
_ROUTER = Rule(("mlp.gate.weight",), _MLP + "router.weight", "whole")
_SHARED_EXPERT = (
    Rule(
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        _MLP + "shared_experts.linear_fc1.weight",
        "gate_up",
    ),
    Rule(("mlp.shared_expert.down_proj.weight",), _MLP + "shared_experts.linear_fc2.weight", "columns"),
    Rule(("mlp.shared_expert_gate.weight",), _MLP + "shared_experts.gate_weight", "whole"),
)
_FIRST_NORM = Rule(
    ("input_layernorm.weight",), "input_layernorm.weight", "whole", _ATTENTION + "linear_qkv.layer_norm_weight"
)
_SECOND_NORM = Rule(
    ("post_attention_layernorm.weight",), "pre_mlp_layernorm.weight", "whole", _MLP + "linear_fc1.layer_norm_weight"
)
_NORM_BEFORE_EXPERTS = replace(_SECOND_NORM, te=None)  # the router reads its output too, so TE does not fuse it
_QKV_BIAS = Rule(tuple(n.format("bias") for n in _QKV), _ATTENTION + "linear_qkv.bias", "qkv")
_QK_NORMS = (
    Rule(("self_attn.q_norm.weight",), _ATTENTION + "q_layernorm.weight", "whole"),
    Rule(("self_attn.k_norm.weight",), _ATTENTION + "k_layernorm.weight", "whole"),
)


def layer_rules(shape: ModelShape) -> tuple[Rule, ...]:
    """The rules of one decoder layer, names relative to the layer on both sides."""
    qkv, output = _ATTENTION_WEIGHTS
    attention = (qkv, *((_QKV_BIAS,) if shape.qkv_bias else ()), *(_QK_NORMS if shape.qk_norm else ()), output)
    if shape.experts is None:
        return (*attention, *_DENSE, _FIRST_NORM, _SECOND_NORM)
    experts = (rule for number in range(shape.experts.count) for rule in _expert(number))
    shared = _SHARED_EXPERT if shape.experts.shared_ffn else ()
    return (*attention, _ROUTER, *experts, *shared, _FIRST_NORM, _NORM_BEFORE_EXPERTS)


def _expert(number: int) -> tuple[Rule, Rule]:
    """The rules of one expert; {} stands for its number on its rank."""
    hf, local, grouped = f"mlp.experts.{number}.", _MLP + "experts.local_experts.{}.", _MLP + "experts."
    gate_up = (hf + "gate_proj.weight", hf + "up_proj.weight")
    return (
        Rule(gate_up, local + "linear_fc1.weight", "gate_up", grouped + "linear_fc1.weight{}", number),
        Rule(
            (hf + "down_proj.weight",), local + "linear_fc2.weight", "columns", grouped + "linear_fc2.weight{}", number
        ),
    )


def all_names(shape: ModelShape) -> list[str]:
    """Every HF tensor name, in the order of `weights()`."""
    names, of_layer = [*EMBEDDING.hf], [n for rule in layer_rules(shape) for n in rule.hf]
    for layer in range(shape.num_layers):
        names += [f"model.layers.{layer}.{n}" for n in of_layer]
    return [*names, *FINAL_NORM.hf, *(() if shape.tied else HEAD.hf)]


def hf_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The full, unpadded shape of an HF tensor."""
    q, kv = shape.q_width, shape.kv_width
    module, _, leaf = name.rpartition(".")
    above, _, part = module.rpartition(".")
    ffn, experts = shape.ffn, shape.experts
    if experts is not None:
        ffn = experts.shared_ffn if above.endswith("shared_expert") else experts.ffn
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": ffn, "up_proj": ffn, "shared_expert_gate": 1}
    rows["gate"] = experts.count if experts else 0
    if part in rows:
        return (rows[part],) if leaf == "bias" else (rows[part], shape.hidden)
    if part in ("q_norm", "k_norm"):
        return (shape.head_dim,)
    table = {"o_proj": (shape.hidden, q), "down_proj": (shape.hidden, ffn)}
    table |= dict.fromkeys(("embed_tokens", "lm_head"), (shape.vocab, shape.hidden))
    return table.get(part, (shape.hidden,))


def to_shard(
    rule: Rule, tensors: Sequence[torch.Tensor], shape: ModelShape, rank: int, size: int, padded_rows: int
) -> torch.Tensor:
    """Full HF tensors -> what tensor rank (for an expert, expert-tensor rank) `rank` of `size` holds; `padded_rows` of the
    vocabulary."""
    if rule.kind == "whole":
        return tensors[0]
    if rule.kind == "rows":
        full = tensors[0]
        missing = padded_rows - full.size(0)
        if missing:
            full = torch.cat([full, full.new_zeros(missing, *full.shape[1:])])
        return full.chunk(size, 0)[rank]
    if rule.kind == "columns":
        return tensors[0].chunk(size, 1)[rank]
    if rule.kind == "gate_up":
        return torch.cat([t.chunk(size, 0)[rank] for t in tensors])
    return _merge_qkv(tensors, shape).chunk(size, 0)[rank]


def from_shards(rule: Rule, shards: torch.Tensor, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """[tensor ranks, *shard] -> (HF name, full tensor), one after the other; vocabulary padding is dropped.

    What needs no copy is a view of `shards`; the rest is copied when its turn comes.
    """
    if rule.kind == "whole":
        yield rule.hf[0], shards[0]
    elif rule.kind == "rows":
        yield rule.hf[0], shards.flatten(0, 1)[: shape.vocab]
    elif rule.kind == "columns":
        yield rule.hf[0], shards.transpose(0, 1).flatten(1)
    elif rule.kind == "gate_up":
        halves = shards.unflatten(1, (2, -1))
        for i, name in enumerate(rule.hf):
            yield name, halves[:, i].flatten(0, 1)
    else:
        parts = _split_qkv(shards.flatten(0, 1), shape)
        for i, name in enumerate(rule.hf):
            yield name, parts[i].flatten(0, 2)


def _merge_qkv(tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """q, k, v -> per key/value group its queries, its k, its v, so that a tensor rank's rows are whole groups."""
    groups, dim = shape.num_kv_groups, shape.head_dim
    rest = tensors[0].shape[1:]
    return torch.cat([t.view(groups, -1, dim, *rest) for t in tensors], dim=1).reshape(-1, *rest)


def _split_qkv(merged: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, ...]:
    """Views [groups, heads of q, k or v per group, head_dim, *rest]."""
    groups, dim = shape.num_kv_groups, shape.head_dim
    per_group = shape.num_heads // groups
    return merged.view(groups, per_group + 2, dim, *merged.shape[1:]).split([per_group, 1, 1], dim=1)
