"""Attention of a whole batch in a few calls, where SGLang's torch-native backend calls once per request from Python.

Requests of similar length are padded to the longest of their group, their cached keys and values are gathered from the
pool, and the group goes through one `scaled_dot_product_attention`. Prompts without a cached prefix need no mask: their
padding lies behind the causal triangle. All else gets a mask of what each query may see.

Contract: results are those of SGLang's own loop up to the last bits of a sum, and those of a request that is alone in
its batch depend on nothing else. A group gathers at most `GATHERED` elements of keys and as many of values, and its mask
has at most `MASKED`, unless one request alone needs more keys than that. Shapes: n requests, q queries and t cached
tokens each, h heads, g KV heads, d head size.
Limits: sliding windows and cross attention go to SGLang's own loop.

A REPLACE hook on `TorchNativeAttnBackend` (SGLang srt/layers/attention/torch_native_backend.py); imported by SGLang's
processes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

GATHERED = 1 << 20  # 4 MB in fp32; more is not faster
MASKED = 1 << 21  # torch turns it into as many floats
PADDING = 1.5  # padded area of a group over its real one ...
SMALL = 1 << 16  # ... unless the group is this small, where a further call costs more than padding


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces of requests that share one call.

    shape: (n, q, t)
    queries: [n * q] rows of the batch's queries, padding repeats a piece's first; None = all of them, in order
    slots: [n * t] places in the pool, padding repeats a request's first
    last_seen: [n, q] the last token that each query sees; None = all tokens, or the causal triangle
    real: [m] which of the n * q are no padding; None = all
    rows: [m] their rows in the batch; None = all of them, in order
    """

    shape: tuple[int, int, int]
    queries: torch.Tensor | None
    slots: torch.Tensor
    last_seen: torch.Tensor | None
    causal: bool
    real: torch.Tensor | None
    rows: torch.Tensor | None

    def mask(self) -> torch.Tensor | None:
        """[n, 1, q, t] True where a query sees a token."""
        if self.last_seen is None:
            return None
        return torch.arange(self.shape[2]) <= self.last_seen[:, None, :, None]


class BatchedAttention(TorchNativeAttnBackend):
    """See the module's docstring. The plan of a batch is made by its first layer and used by all of them."""

    _groups: tuple[Group, ...] | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._groups = None

    def _run_sdpa_forward_decode(
        self, query: Any, output: Any, k_cache: Any, v_cache: Any, req_to_token: Any, req_pool_indices: Any,
        seq_lens: Any, encoder_lens: Any = None, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        if _is_special(encoder_lens, options):
            return super()._run_sdpa_forward_decode(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, **options
            )
        if self._groups is None:
            lengths = seq_lens.numpy()
            ones = np.ones_like(lengths)
            self._groups = tuple(plan(lengths - 1, ones, req_to_token, req_pool_indices, _width(k_cache)))
        return self._attend(query, output, k_cache, v_cache, options)

    def _run_sdpa_forward_extend(
        self, query: Any, output: Any, k_cache: Any, v_cache: Any, req_to_token: Any, req_pool_indices: Any,
        seq_lens: Any, extend_prefix_lens: Any, extend_seq_lens: Any, encoder_lens: Any = None, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        if _is_special(encoder_lens, options) or not options.get("causal"):
            return super()._run_sdpa_forward_extend(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens,
                extend_seq_lens, encoder_lens, **options,
            )  # fmt: skip
        if self._groups is None:
            before, new = extend_prefix_lens.numpy(), extend_seq_lens.numpy()
            self._groups = tuple(plan(before, new, req_to_token, req_pool_indices, _width(k_cache)))
        return self._attend(query, output, k_cache, v_cache, options)

    def _attend(self, query: Any, output: Any, k_cache: Any, v_cache: Any, options: dict[str, Any]) -> torch.Tensor:
        """query [tokens, h, d], caches [pool, g, d] -> output [tokens, h, d of the values], written in place."""
        for group in self._groups or ():
            n, q, t = group.shape
            chosen = query if group.queries is None else query.index_select(0, group.queries)
            keys, values = (
                cache.view(len(cache), -1).index_select(0, group.slots).view(n, t, *cache.shape[1:]).to(query.dtype)
                for cache in (k_cache, v_cache)
            )
            # the query heads that share a KV head are to SDPA as many queries, where each sees the same tokens
            chosen = (
                chosen.view(n, k_cache.shape[1], -1, query.shape[2])
                if q == 1
                else chosen.view(n, q, *query.shape[1:]).transpose(1, 2)
            )
            found = scaled_dot_product_attention(
                chosen, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=group.mask(), is_causal=group.causal,
                scale=options.get("scaling"), enable_gqa=chosen.shape[1] != keys.shape[2],
            )  # fmt: skip
            found = (found if q == 1 else found.transpose(1, 2)).reshape(n * q, *output.shape[1:])
            if group.rows is None:
                output.copy_(found)
            else:
                output.index_copy_(0, group.rows, found if group.real is None else found.index_select(0, group.real))
        return output


def plan(
    before: np.ndarray, new: np.ndarray, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, width: int
) -> Iterator[Group]:
    """The groups of a batch in which request i has `before[i]` cached tokens and `new[i]` queries behind them. `width`
    = elements of one token's keys."""
    request, first, length = _pieces(before.astype(np.int64), new.astype(np.int64))
    row = (np.cumsum(new) - new)[request] + first - before[request]
    order = np.arange(len(request))
    in_order = _fitting(first, length, width) == len(order)
    if not in_order:
        order = np.lexsort((length, first + length, first > 0))
    while len(order):
        members, order = np.split(order, [_fitting(first[order], length[order], width)])
        slots = req_to_token[req_pool_indices[torch.from_numpy(request[members])]]
        yield _group(first[members], length[members], row[members], slots, in_order=in_order)


def _pieces(before: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(request, cached tokens before it, queries) of every piece: a whole request, or as much as a mask has room for."""
    room = np.where(before > 0, np.maximum(1, MASKED // np.maximum(before + new, 1)), np.maximum(new, 1))
    counts = -(-new // room)
    request = np.repeat(np.arange(len(new)), counts)
    offset = (np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)) * room[request]
    return request, before[request] + offset, np.minimum(new[request] - offset, room[request])


def _fitting(first: np.ndarray, length: np.ndarray, width: int) -> int:
    """How many of these pieces, from the beginning, share a group."""
    count, masked = np.arange(1, len(length) + 1), first > 0
    tokens = count * np.maximum.accumulate(first + length)
    area = tokens * np.maximum.accumulate(length)
    fits = (area <= PADDING * np.cumsum(length * (first + length))) | (area <= SMALL)
    fits &= (tokens * width <= GATHERED) & (masked == masked[0]) & ~(masked & (area > MASKED))
    fits[0] = True
    return len(fits) if fits.all() else int(np.argmin(fits))


def _group(first: np.ndarray, length: np.ndarray, row: np.ndarray, slots: torch.Tensor, *, in_order: bool) -> Group:
    """`row` [n] is each piece's first row in the batch, `slots` [n, at least t] the pool's places of its request."""
    n, q, t = len(first), int(length.max()), int((first + length).max())
    position, token = np.arange(q), np.arange(t)
    real = position < length[:, None]
    held = torch.from_numpy(token < (first + length)[:, None])
    slots = slots[:, :t].to(torch.int64)
    slots = torch.where(held, slots, slots[:, :1])
    causal = not first.any()
    all_seen = q == 1 and bool(held.all())
    whole = bool(real.all())
    rows = row[:, None] + np.where(real, position, 0)
    return Group(
        shape=(n, q, t),
        queries=None if whole and in_order else torch.from_numpy(rows.ravel()),
        slots=slots.flatten(),
        last_seen=None if causal or all_seen else torch.from_numpy(first[:, None] + position),
        causal=causal and q > 1,
        real=None if whole else torch.from_numpy(np.flatnonzero(real)),
        rows=None if whole and in_order else torch.from_numpy(rows[real]),
    )


def _width(cache: torch.Tensor) -> int:
    return cache.shape[1] * cache.shape[2]


def _is_special(encoder_lens: Any, options: dict[str, Any]) -> bool:
    return (
        encoder_lens is not None or bool(options.get("is_cross_attn")) or options.get("sliding_window_size") is not None
    )
