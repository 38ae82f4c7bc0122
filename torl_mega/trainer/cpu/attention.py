"""Core attention for the local layer spec: torch SDPA over packed sequences, with or without context parallelism.

Replaces Transformer Engine's attention on a CPU, and on a GPU under `trainer.layer_spec: local`.
Shapes: t = packed tokens on this rank, h query heads, g key/value heads, d head_dim.
Sequences of similar length are padded to the longest of their group and go through one SDPA call: a call per sequence
costs 0.3 ms each way in Python and dispatch, which a few hundred short sequences feel. Padding sits behind the causal
mask, so it is never seen, and its rows are dropped again: it adds exactly zero to every gradient.

Context parallelism: rank r of c holds chunks r and 2c-1-r of every sequence (lengths are multiples of 2c), Transformer
Engine's zigzag. K and V are all-gathered over the group (backward: reduce-scatter): right, not fast.
Limits: causal self-attention, no dropout, packed (thd) input only.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

_PADDED_AREA = 1.3  # a group's padded attention area may exceed the real one by this factor


@dataclass(frozen=True)
class LengthGroup:
    """b sequences that share one SDPA call, padded to s tokens; n of the positions hold real tokens."""

    rows: torch.Tensor  # [b * s] packed index of the token at every position; on padding, of the sequence's first token
    places: torch.Tensor  # [n] index into the padded [b * s] of every real token
    shape: tuple[int, int]  # (b, s)


@dataclass
class GroupedSeqParams(PackedSeqParams):
    """Megatron's record of a packed micro-batch plus what the grouped attention needs, computed once per micro-batch."""

    groups: tuple[LengthGroup, ...] = ()
    restore: torch.Tensor | None = None  # [t] from grouped order back to packed order


def length_groups(lengths: np.ndarray, device: torch.device) -> tuple[tuple[LengthGroup, ...], torch.Tensor]:
    """Groups sequences of similar length ([n] tokens each). Returns the groups and the [t] index that restores packed order."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    order = np.argsort(-lengths, kind="stable")
    groups: list[LengthGroup] = []
    taken: list[np.ndarray] = []
    begin = 0
    while begin < len(order):
        longest, area, end = int(lengths[order[begin]]), 0.0, begin
        while end < len(order):
            area += float(lengths[order[end]]) ** 2
            if longest**2 * (end + 1 - begin) > _PADDED_AREA * area:
                break
            end += 1
        members = order[begin:end]
        position = np.arange(longest)[None, :]
        real = position < lengths[members][:, None]
        rows = starts[members][:, None] + np.where(real, position, 0)
        groups.append(
            LengthGroup(
                rows=torch.from_numpy(rows.ravel()).to(device),
                places=torch.from_numpy(np.flatnonzero(real.ravel())).to(device),
                shape=(len(members), longest),
            )
        )
        taken.append(rows[real])
        begin = end
    restore = np.empty(int(lengths.sum()), np.int64)
    restore[np.concatenate(taken)] = np.arange(len(restore))
    return tuple(groups), torch.from_numpy(restore).to(device)


class SdpaCoreAttention(MegatronModule):
    """See the module's docstring. The constructor's arguments are those Megatron's spec passes."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert not config.attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group: Any = (
            pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        )

    def forward(
        self,
        query: torch.Tensor,  # [t, h, d]
        key: torch.Tensor,  # [t, g, d]
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:  # [t, h * d]
        assert isinstance(packed_seq_params, GroupedSeqParams)
        assert attention_mask is None
        assert attention_bias is None
        if self.cp_group.size() > 1:
            return self._context_parallel(query, key, value, packed_seq_params)
        gqa = query.size(1) != key.size(1)
        parts = []
        for group in packed_seq_params.groups:
            q, k, v = (
                x.index_select(0, group.rows).view(*group.shape, *x.shape[1:]).transpose(1, 2)
                for x in (query, key, value)
            )
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=gqa)
            parts.append(out.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, group.places))
        assert packed_seq_params.restore is not None
        return torch.cat(parts).index_select(0, packed_seq_params.restore)

    def _context_parallel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: GroupedSeqParams
    ) -> torch.Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        bounds = packed.cu_seqlens_q.tolist()
        order = torch.from_numpy(np.concatenate([zigzag(bounds, size, i) for i in range(size)]).argsort()).to(
            query.device
        )
        key, value = (
            gather_from_sequence_parallel_region(
                x.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
            ).index_select(0, order)
            for x in (key, value)
        )
        mine = torch.from_numpy(zigzag(bounds, size, rank)).to(query.device)
        lengths = [(end - start) // size for start, end in pairwise(bounds)]
        gqa = query.size(1) != key.size(1)
        parts = []
        for q, positions, start, end in zip(
            query.split(lengths), mine.split(lengths), bounds[:-1], bounds[1:], strict=True
        ):
            mask = torch.arange(start, end, device=query.device)[None, :] <= positions[:, None]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, key[start:end], value[start:end]))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=gqa)
            parts.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(parts).flatten(1)


def zigzag(bounds: list[int], size: int, rank: int) -> np.ndarray:
    """Packed indices of the tokens context-parallel rank `rank` of `size` holds, in its local order."""
    pieces = []
    for start, end in pairwise(bounds):
        chunk = (end - start) // (2 * size)
        assert chunk * 2 * size == end - start
        pieces.append(np.arange(start + rank * chunk, start + (rank + 1) * chunk))
        pieces.append(np.arange(start + (2 * size - 1 - rank) * chunk, start + (2 * size - rank) * chunk))
    return np.concatenate(pieces)
