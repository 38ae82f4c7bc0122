"""Plans the packed micro-batches of a batch: a token budget each, the same number on every rank, equal cost per rank.

Contract: `plan_micro_batches` is a pure function of lengths and settings, so every rank computes the same plan and takes
its own part. Every sequence lands in exactly one micro-batch; a micro-batch may be empty when there are fewer sequences than
micro-batches (the trainer puts a dummy there). The cost of a sequence of L tokens is L + L^2 / `quadratic_at`.
Limits: sequences are never split; a sequence longer than the budget is an error.

Method: as few micro-batches as the token budget allows, filled longest-first into the least loaded one with room (LPT,
Graham 1969), then assigned to the ranks the same way, then balanced by swaps between the most and the least loaded rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torl_mega.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """micro_batches[rank][i] = indices of the sequences in that rank's i-th micro-batch."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    imbalance: float  # cost of the most loaded rank over the mean, minus 1

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    num_ranks: int,
    quadratic_at: float,
    align: int = 1,
    multiple: int = 1,
) -> MicroBatchPlan:
    """Micro-batches of at most `max_tokens` for each of `num_ranks` data-parallel ranks; `lengths` in tokens.

    `align`: every sequence takes a multiple of this many tokens (context parallelism); `multiple`: micro-batches per rank
    come in multiples of this (an interleaved pipeline wants the number of stages). Raises ConfigError when one sequence
    is over the budget.
    """
    sizes = -(-np.asarray(lengths, np.int64) // align) * align
    if sizes.size and sizes.max() > max_tokens:
        raise ConfigError(
            f"a sequence of {int(sizes.max())} tokens is over trainer.micro_batch_tokens = {max_tokens}; raise it"
        )
    costs = sizes + sizes.astype(np.float64) ** 2 / quadratic_at
    order = np.argsort(-costs, kind="stable")
    per_rank = max(1, -(-int(sizes.sum()) // (max_tokens * num_ranks)))
    while True:
        per_rank = -(-per_rank // multiple) * multiple
        bins = _fill(order, sizes, costs, per_rank * num_ranks, max_tokens)
        if bins is not None:
            break
        per_rank += 1
    ranks = _assign_to_ranks(bins, costs, num_ranks)
    _balance_by_swaps(ranks, sizes, costs, max_tokens)
    totals = np.array([sum(costs[i] for b in rank for i in b) for rank in ranks])
    imbalance = float(totals.max() / totals.mean() - 1) if totals.sum() else 0.0
    return MicroBatchPlan(tuple(tuple(tuple(sorted(b)) for b in rank) for rank in ranks), imbalance)


def _fill(
    order: np.ndarray, sizes: np.ndarray, costs: np.ndarray, num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Longest first into the least loaded bin with room; None when some sequence finds none."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    heap = [(0.0, b) for b in range(num_bins)]
    for i in order.tolist():
        size, aside = int(sizes[i]), []
        while heap and tokens[heap[0][1]] + size > max_tokens:
            aside.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, chosen = heapq.heappop(heap)
        bins[chosen].append(i)
        tokens[chosen] += size
        heapq.heappush(heap, (cost + float(costs[i]), chosen))
        for item in aside:
            heapq.heappush(heap, item)
    return bins


def _assign_to_ranks(bins: list[list[int]], costs: np.ndarray, num_ranks: int) -> list[list[list[int]]]:
    """Most expensive bin first, to the least loaded rank that still has a free place."""
    per_rank = len(bins) // num_ranks
    priced = sorted(((float(sum(costs[i] for i in b)), n) for n, b in enumerate(bins)), key=lambda x: (-x[0], x[1]))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for cost, n in priced:
        free = [r for r in range(num_ranks) if len(ranks[r]) < per_rank]
        chosen = min(free, key=lambda r: (totals[r], r))
        ranks[chosen].append(bins[n])
        totals[chosen] += cost
    return ranks


def _balance_by_swaps(ranks: list[list[list[int]]], sizes: np.ndarray, costs: np.ndarray, max_tokens: int) -> None:
    """Moves or swaps single sequences from the most to the least loaded rank while that narrows the gap; in place."""
    if len(ranks) < 2:
        return
    totals = [sum(float(costs[i]) for b in rank for i in b) for rank in ranks]
    for _ in range(64 * len(ranks)):
        high, low = int(np.argmax(totals)), int(np.argmin(totals))
        gap = totals[high] - totals[low]
        if gap <= 0.002 * max(sum(totals) / len(totals), 1e-9):
            return
        step = _best_exchange(ranks[high], ranks[low], sizes, costs, gap, max_tokens)
        if step is None:
            return
        from_bin, given, to_bin, taken, moved = step
        from_bin.remove(given)
        to_bin.append(given)
        if taken is not None:
            to_bin.remove(taken)
            from_bin.append(taken)
        totals[high] -= moved
        totals[low] += moved


def _best_exchange(
    high: list[list[int]], low: list[list[int]], sizes: np.ndarray, costs: np.ndarray, gap: float, max_tokens: int
) -> tuple[list[int], int, list[int], int | None, float] | None:
    """The move or swap whose cost difference is nearest to half the gap and that keeps both token budgets."""
    best: tuple[list[int], int, list[int], int | None, float] | None = None
    best_left = gap
    for to_bin in low:
        room_to = max_tokens - int(sizes[to_bin].sum()) if to_bin else max_tokens
        takes = np.array([*to_bin, -1])
        take_cost = np.array([*costs[to_bin], 0.0]) if to_bin else np.zeros(1)
        take_size = np.array([*sizes[to_bin], 0]) if to_bin else np.zeros(1, np.int64)
        for from_bin in high:
            if not from_bin:
                continue
            room_from = max_tokens - int(sizes[from_bin].sum())
            give = np.array(from_bin)
            moved = costs[give][:, None] - take_cost[None, :]
            grow = sizes[give][:, None] - take_size[None, :]
            left = np.where((grow <= room_to) & (-grow <= room_from) & (moved > 0), np.abs(gap - 2 * moved), np.inf)
            g, t = np.unravel_index(int(left.argmin()), left.shape)
            if left[g, t] < best_left * (1 - 1e-9):
                best_left = float(left[g, t])
                taken = int(takes[t])
                best = (from_bin, int(give[g]), to_bin, None if taken < 0 else taken, float(moved[g, t]))
    return best
