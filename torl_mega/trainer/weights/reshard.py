"""Moves weights between HF tensors and this rank's shards, one tensor at a time, in any layout.

Contract: `load` fills every parameter of this rank from an HF folder; `gather` is a collective over the ranks of
data-parallel and context-parallel rank 0, and over those that hold the first copy of an expert, that yields HF-named, unpadded
tensors on global rank 0, in the order of the table. They may be views of parameters: copy what must outlive an update.
`outlines` goes through the same steps on every rank, where those other than 0 get tensors without data. All work on the type
the parameters have.
Extra memory on tensor rank 0: the shards of one parameter and one tensor made of them (tests/parallel/test_reshard.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from torl_mega.interfaces import NamedTensor
from torl_mega.layout import ModelShape, layer_owner, padded_vocab
from torl_mega.trainer.weights.hf_io import HfReader
from torl_mega.trainer.weights.hf_mapping import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Rule,
    from_shards,
    hf_shape,
    layer_rules,
    to_shard,
)


def _gathered(shard: torch.Tensor, group: Any) -> torch.Tensor | None:
    """[ranks of the group, *shard] on its first rank; None on the others."""
    shards = shard.new_empty(group.size(), *shard.shape) if group.rank() == 0 else None
    parts = None if shards is None else list(shards.unbind())
    dist.gather(shard.contiguous(), parts, dst=dist.get_global_rank(group, 0), group=group)
    return shards


def _uses_te(names: Sequence[str]) -> bool:
    return any(name.endswith("linear_qkv.layer_norm_weight") for name in names)


class WeightMap:
    """Finds the parameter (of which chunk of which pipeline stage) that each rule of the table stands for."""

    def __init__(self, chunks: Sequence[Any], shape: ModelShape) -> None:
        self.shape = shape
        self.parameters = [dict(chunk.named_parameters()) for chunk in chunks]
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.pp_size = parallel_state.get_pipeline_model_parallel_world_size()
        ep: Any = parallel_state.get_expert_model_parallel_group()
        etp: Any = parallel_state.get_expert_tensor_parallel_group()
        edp: Any = parallel_state.get_expert_data_parallel_group()
        self.ep_rank, self.ep_size = ep.rank(), ep.size()
        self.etp_rank, self.etp_size = etp.rank(), etp.size()
        self.edp_rank = edp.rank()
        self.num_chunks = len(chunks)
        self.rules = layer_rules(shape)
        count = shape.experts.count if shape.experts else 0
        self.experts_per_rank = max(1, count // self.ep_size)
        self.padded_rows = padded_vocab(shape.vocab, self.tp_size)
        # every stage holds layers, so each can tell for itself
        self.te = _uses_te([name for names in self.parameters for name in names])

    def entries(self) -> Iterator[tuple[Rule, str, int, torch.nn.Parameter | None]]:
        """(rule, HF prefix, owning stage, this rank's parameter or None) for every tensor of the model, in order."""
        yield EMBEDDING, "", 0, self.parameters[0].get(EMBEDDING.megatron)
        for layer in range(self.shape.num_layers):
            stage, chunk, index = layer_owner(layer, self.shape.num_layers, self.pp_size, self.num_chunks)
            for rule in self.rules:
                mine = None
                holder, local = self._holder(rule)
                if stage == self.pp_rank and holder in (None, self.ep_rank):
                    mine = self.parameters[chunk][f"decoder.layers.{index}.{rule.name(self.te, local)}"]
                yield rule, f"model.layers.{layer}.", stage, mine
        last = self.pp_size - 1
        yield FINAL_NORM, "", last, self.parameters[-1].get(FINAL_NORM.megatron)
        if not self.shape.tied:
            yield HEAD, "", last, self.parameters[-1].get(HEAD.megatron)

    def _holder(self, rule: Rule) -> tuple[int | None, int]:
        """The expert-parallel rank that holds a rule's expert (None: every rank holds a part), and the expert's number there."""
        return (None, 0) if rule.expert is None else divmod(rule.expert, self.experts_per_rank)

    @torch.no_grad()
    def load(self, reader: HfReader) -> None:
        """Fills every parameter of this rank from an HF folder. Asserts that none is left out."""
        done: set[int] = set()
        for rule, prefix, _, parameter in self.entries():
            if parameter is not None:
                self._fill(parameter, rule, [reader.get(prefix + name) for name in rule.hf])
                done.add(id(parameter))
        tied_copy = self.parameters[-1].get(HEAD.megatron)
        if self.shape.tied and tied_copy is not None:  # tied with several stages: the last one has its own copy
            self._fill(tied_copy, HEAD, [reader.get(EMBEDDING.hf[0])])
            done.add(id(tied_copy))
        left = [n for names in self.parameters for n, p in names.items() if id(p) not in done]
        assert not left, f"parameters without a rule: {left}"

    def _fill(self, parameter: torch.nn.Parameter, rule: Rule, tensors: list[torch.Tensor]) -> None:
        rank, size = (self.tp_rank, self.tp_size) if rule.expert is None else (self.etp_rank, self.etp_size)
        shard = to_shard(rule, tensors, self.shape, rank, size, self.padded_rows)
        assert shard.shape == parameter.shape, (rule.megatron, tuple(shard.shape), tuple(parameter.shape))
        parameter.copy_(shard)

    def gather(self) -> Iterator[NamedTensor]:
        """HF-named full tensors. Collective: every rank iterates to the end; yields on global rank 0 only."""
        for name, tensor in self.outlines():
            if tensor.device.type != "meta":
                yield name, tensor
            del tensor  # so that it is gone before the next one is there

    def outlines(self) -> Iterator[NamedTensor]:
        """As `gather`, but yields on every rank: tensors on rank 0, and on the others what they look like, on the meta device,
        after this rank's part in the collectives behind each rule's tensors.

        Not under `no_grad`, whose wrapper of generators keeps each tensor until the next one is there.
        """
        takes_part = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        for rule, prefix, stage, parameter in self.entries():
            shards = None
            if rule.expert is not None and stage == self.pp_rank:
                shards = self._gather_expert(rule, None if parameter is None else parameter.detach())
            elif takes_part and parameter is not None:
                shards = self._gather_tensor_group(rule, parameter.detach())
            if takes_part and self.tp_rank == 0:
                named = self._to_rank0(prefix, rule, stage, shards)
                del shards  # only the generator holds them, and only while they are needed
                yield from named
            else:
                yield from self._outlined(prefix, rule)

    def _gather_tensor_group(self, rule: Rule, shard: torch.Tensor) -> torch.Tensor | None:
        """[tensor ranks, *shard] on tensor rank 0; None elsewhere."""
        if self.tp_size == 1 or rule.kind == "whole":
            return shard[None]
        return _gathered(shard, parallel_state.get_tensor_model_parallel_group())

    def _gather_expert(self, rule: Rule, shard: torch.Tensor | None) -> torch.Tensor | None:
        """[expert-tensor ranks, *shard] of an expert on its stage's first rank, which is its first data and tensor rank too;
        None elsewhere. The ranks that hold the first copy of the stage's experts take part: gathered over the expert's
        own ranks, then sent to the first of the stage."""
        if self.edp_rank > 0:
            return None
        holder, _ = self._holder(rule)
        shards = None
        if shard is not None:
            group = parallel_state.get_expert_tensor_parallel_group()
            shards = shard[None] if self.etp_size == 1 else _gathered(shard, group)
        if holder == 0 or self.etp_rank > 0:
            return shards
        group: Any = parallel_state.get_expert_tensor_and_model_parallel_group()
        if shards is not None:
            dist.send(shards.contiguous(), dst=dist.get_global_rank(group, 0), group=group)
            return None
        if self.ep_rank > 0:
            return None
        like = self._like_expert(rule)
        shards = like.new_empty(self.etp_size, *like.shape)
        assert holder is not None
        dist.recv(shards, src=dist.get_global_rank(group, holder * self.etp_size), group=group)
        return shards

    def _like_expert(self, rule: Rule) -> torch.Tensor:
        """An expert of this rank cut as the one of `rule` is."""
        return self.parameters[0]["decoder.layers.0." + rule.name(self.te, 0)]

    def _to_rank0(self, prefix: str, rule: Rule, stage: int, shards: torch.Tensor | None) -> Iterator[NamedTensor]:
        """Assembles a rule's tensors on the owning stage's tensor rank 0 and sends them to stage 0, which yields them; the others
        yield outlines, each in step with its tensor: rank 0 may have other business with a rank before it takes the next."""
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        if shards is not None:
            named = from_shards(rule, shards, self.shape)
            del shards
            for name, tensor in named:
                self._check(prefix + name, tensor)
                if stage == 0:
                    yield prefix + name, tensor
                else:
                    dist.send(tensor.contiguous(), dst=dist.get_global_rank(group, 0), group=group)
                    yield prefix + name, tensor.to("meta")
                del tensor
        elif self.pp_rank == 0:
            like = next(iter(self.parameters[0].values()))
            for name in rule.hf:
                tensor = torch.empty(hf_shape(name, self.shape), dtype=like.dtype, device=like.device)
                dist.recv(tensor, src=dist.get_global_rank(group, stage), group=group)
                yield prefix + name, tensor
                del tensor
        else:
            yield from self._outlined(prefix, rule)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        """A shard that was not merged must not leave: SGLang's loader of experts fills what is missing with zeros."""
        wanted = hf_shape(name, self.shape)
        assert tensor.shape == wanted, f"{name} is {tuple(tensor.shape)} after it was gathered, the model says {wanted}"

    def _outlined(self, prefix: str, rule: Rule) -> Iterator[NamedTensor]:
        dtype = next(iter(self.parameters[0].values())).dtype
        for name in rule.hf:
            yield prefix + name, torch.empty(hf_shape(name, self.shape), dtype=dtype, device="meta")
