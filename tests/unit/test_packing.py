"""Packing: nothing lost, budgets kept, ranks even, on a heavy-tailed mix and on whatever hypothesis finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torl_mega.errors import ConfigError
from torl_mega.trainer.packing import plan_micro_batches


def heavy_tailed(count: int, longest: int, seed: int = 0) -> list[int]:
    """Log-normal lengths around 600 with a tail up to the limit, as answers with tool calls have."""
    lengths = np.random.default_rng(seed).lognormal(np.log(600), 0.8, count)
    return np.clip(lengths, 50, longest).astype(int).tolist()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=80),
    ranks=st.integers(1, 5),
    align=st.sampled_from([1, 2, 4]),
    multiple=st.sampled_from([1, 2, 3]),
)
def test_every_sequence_once_within_budget(lengths: list[int], ranks: int, align: int, multiple: int) -> None:
    result = plan_micro_batches(
        lengths, max_tokens=256, num_ranks=ranks, quadratic_at=100.0, align=align, multiple=multiple
    )
    assert len(result.micro_batches) == ranks
    assert len({len(rank) for rank in result.micro_batches}) == 1
    assert result.num_micro_batches % multiple == 0
    seen = [i for rank in result.micro_batches for b in rank for i in b]
    assert sorted(seen) == list(range(len(lengths)))
    for rank in result.micro_batches:
        for b in rank:
            assert sum(-(-lengths[i] // align) * align for i in b) <= 256


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_heavy_tail_is_balanced_in_few_micro_batches(ranks: int) -> None:
    lengths = heavy_tailed(1024, 3472)
    result = plan_micro_batches(lengths, max_tokens=16384, num_ranks=ranks, quadratic_at=30000.0)
    assert result.imbalance <= 0.03
    fewest = -(-sum(lengths) // (16384 * ranks))
    assert result.num_micro_batches <= fewest + 1


def test_quadratic_cost_counts() -> None:
    """Two ranks, one long sequence against many short ones of the same token total: tokens alone would call it even."""
    lengths = [1000] + [100] * 10 + [100] * 30
    result = plan_micro_batches(lengths, max_tokens=4000, num_ranks=2, quadratic_at=500.0)
    cost = [sum(lengths[i] + lengths[i] ** 2 / 500 for b in rank for i in b) for rank in result.micro_batches]
    assert abs(cost[0] - cost[1]) / sum(cost) < 0.02


def test_same_plan_everywhere() -> None:
    lengths = heavy_tailed(200, 3000)
    first = plan_micro_batches(lengths, max_tokens=8192, num_ranks=4, quadratic_at=20000.0)
    assert first == plan_micro_batches(list(lengths), max_tokens=8192, num_ranks=4, quadratic_at=20000.0)


def test_too_long_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"300 tokens is over trainer.micro_batch_tokens = 256"):
        plan_micro_batches([10, 300], max_tokens=256, num_ranks=1, quadratic_at=100.0)
