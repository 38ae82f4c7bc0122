"""One packed micro-batch as tensors: the model's input and what the loss needs, for this context-parallel rank.

Positions: the model's output at token t-1 predicts token t, so a sampled token t is read off row t-1 of its sequence. Only
those rows go through the head; prompts and observations never do.

    tokens    7 8 1 2 5 3      (prompt 7 8, sampled 1 2, observation 5, sampled 3)
    rows        1 2   4        -> targets 1 2 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from torl_mega.trainer.packing import MicroBatchPlan
from torl_mega.trainer.parallel import share
from torl_mega.types import Sample


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """n = trained tokens on this rank, t = packed tokens on this rank."""

    token_ids: torch.Tensor  # [1, t] int64
    packed: PackedSeqParams
    rows: torch.Tensor  # [n] int64, over the t of all tensor ranks together
    targets: torch.Tensor  # [n] int64
    where: np.ndarray  # [n] index of each target in the concatenation of the batch's samples
    sequence: torch.Tensor  # [t] int64 number of each token's sequence, -1 on padding
    lengths: torch.Tensor  # [sequences] tokens of each, all context ranks together
    place: np.ndarray  # [t] index of each token in the concatenation of the batch's samples, -1 on padding
    # [t, layers, k] int16 experts to take, -1 = the router's own choice; None = all are its own
    routes: torch.Tensor | None
    num_tokens: int  # real tokens, all context ranks together
    num_padding: int


def build_micro_batch(
    samples: Sequence[Sample],
    offsets: np.ndarray,  # [len(samples) + 1] start of each sample in the concatenation
    members: Sequence[int],
    *,
    align: int,  # every sequence is padded to this multiple (2 * context, 1 without)
    total_align: int,  # and this rank's total to this one (tensor under sequence parallelism, FP8's block)
    context_size: int,
    context_rank: int,
    device: torch.device,
    local: bool,
) -> MicroBatch:
    """Packs the samples `members` of the batch; an empty list gives one dummy sequence that trains nothing. `local`: for the
    attention of the local layers (layer_spec.py)."""
    lengths = [len(samples[i].token_ids) for i in members]
    padded = [-(-n // align) * align for n in lengths]
    tail = _tail(sum(padded), align, total_align * context_size)
    if tail or not padded:
        padded.append(tail or align * total_align)
    bounds = np.concatenate([[0], np.cumsum(padded)])
    ids, owner = np.zeros(bounds[-1], np.int64), np.full(bounds[-1], -1, np.int64)
    origin, routes = owner.copy(), _no_routes(samples, len(ids))
    rows, targets, where = [], [], []
    for slot, i in enumerate(members):
        start, sample = int(bounds[slot]), samples[i]
        ids[start : start + lengths[slot]] = sample.token_ids
        owner[start : start + lengths[slot]] = slot
        origin[start : start + lengths[slot]] = np.arange(offsets[i], offsets[i] + lengths[slot])
        if routes is not None and sample.routes is not None:
            routes[start : start + lengths[slot]] = sample.routes
        sampled = np.flatnonzero(sample.loss_mask)
        rows.append(start + sampled - 1)
        targets.append(sample.token_ids[sampled])
        where.append(offsets[i] + sampled)
    row = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    target = np.concatenate(targets) if targets else np.zeros(0, np.int64)
    place = np.concatenate(where) if where else np.zeros(0, np.int64)
    if context_size > 1:  # keep the tokens of this rank, and the targets whose rows are among them
        from torl_mega.trainer.cpu.attention import zigzag

        held = zigzag(bounds.tolist(), context_size, context_rank)
        new = np.full(len(ids), -1, np.int64)
        new[held] = np.arange(len(held))
        keep = new[row] >= 0
        ids, row, target, place = ids[held], new[row[keep]], target[keep], place[keep]
        owner, origin, routes = owner[held], origin[held], None if routes is None else routes[held]
    return MicroBatch(
        token_ids=torch.from_numpy(ids)[None].to(device),
        packed=_packed_params(np.asarray(padded), bounds, context_size, device, local),
        rows=torch.from_numpy(row).to(device),
        targets=torch.from_numpy(np.ascontiguousarray(target, np.int64)).to(device),
        where=place,
        sequence=torch.from_numpy(owner).to(device),
        lengths=torch.tensor(lengths or [1], dtype=torch.float32, device=device),
        place=origin,
        routes=None if routes is None else torch.from_numpy(routes).to(device),
        num_tokens=sum(lengths),
        num_padding=int(bounds[-1]) - sum(lengths),
    )


def _no_routes(samples: Sequence[Sample], num_tokens: int) -> np.ndarray | None:
    """[num_tokens, layers, k] of -1; None where no sample of the batch has routes."""
    known = next((s.routes for s in samples if s.routes is not None), None)
    return None if known is None else np.full((num_tokens, *known.shape[1:]), -1, np.int16)


def _tail(total: int, align: int, total_align: int) -> int:
    """Fewest further tokens, in steps of `align`, that make the total a multiple of `total_align`."""
    tail = 0
    while (total + tail) % total_align:
        tail += align
    return tail


def _packed_params(
    lengths: np.ndarray, bounds: np.ndarray, context_size: int, device: torch.device, local: bool
) -> PackedSeqParams:
    """Megatron's record of where each sequence lies; for the local layers with what their grouped attention needs."""
    edges = torch.from_numpy(bounds.astype(np.int32)).to(device)
    common = {
        "qkv_format": "thd",
        "cu_seqlens_q": edges,
        "cu_seqlens_kv": edges,
        "max_seqlen_q": int(lengths.max()),
        "max_seqlen_kv": int(lengths.max()),
    }
    if not local:
        return PackedSeqParams(**common)
    from torl_mega.trainer.cpu.attention import GroupedSeqParams, length_groups

    if context_size > 1:
        return GroupedSeqParams(**common)
    groups, restore = length_groups(lengths, device)
    return GroupedSeqParams(**common, groups=groups, restore=restore)


def packing_metrics(samples: Sequence[Sample], plan: MicroBatchPlan, micros: Sequence[MicroBatch]) -> dict[str, float]:
    """Totals of the mini-batch; the padding's fraction is rank 0's (other ranks differ in the last few tokens only)."""
    real, padding = sum(m.num_tokens for m in micros), sum(m.num_padding for m in micros)
    return {
        "num_tokens": float(sum(len(s.token_ids) for s in samples)),
        "num_trained_tokens": float(sum(int(s.loss_mask.sum()) for s in samples)),
        "num_micro_batches": float(len(micros)),
        "padding_share": share(lambda: padding / max(real + padding, 1)),
        "dp_imbalance": plan.imbalance,
    }
