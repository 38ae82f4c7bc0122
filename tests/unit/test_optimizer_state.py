"""Flat ranges of parameters as rectangles: whatever the cuts, the pieces of all ranks are the whole tensor, once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torl_mega.trainer.cpu import backend as cpu_backend

cpu_backend.install()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from torl_mega.trainer.weights.optimizer_state import _cut  # noqa: E402


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 7), width=st.integers(0, 5), data=st.data())
def test_the_pieces_of_all_ranks_make_up_the_tensor(rows: int, width: int, data: st.DataObject) -> None:
    """Width 0: a vector. Saved as two tensors along the first axis, as gate and up are, of layer 1 of 3."""
    shape = (2 * rows, width) if width else (2 * rows,)
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    halves = [
        ShardedTensor.from_rank_offsets("w", half, (0, 1, 3), (1, n, 2), replica_id=(0, 0, 0), prepend_axis_num=1)
        for n, half in enumerate(whole.chunk(2))
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=4)))
    saved = torch.zeros(halves[0].global_shape)
    for first, last in zip([0, *cuts], [*cuts, whole.numel()], strict=True):
        pieces = list(_cut("param", whole.flatten()[first:last], first, halves))
        assert len(pieces) <= 2 * 3
        for piece in pieces:
            assert (piece.key, piece.global_shape) == ("optimizer.state.param.w", tuple(saved.shape))
            saved[piece.global_slice()] += piece.data
    assert torch.equal(saved[1], whole)
    assert not saved[[0, 2]].any()


@pytest.mark.parametrize(("first", "last", "shapes"), [(0, 20, [(4, 5)]), (3, 13, [(1, 2), (1, 5), (1, 3)])])
def test_a_matrix_takes_three_rectangles_at_most(first: int, last: int, shapes: list[tuple[int, int]]) -> None:
    whole = torch.arange(20.0).view(4, 5)
    shard = ShardedTensor.from_rank_offsets("w", whole, replica_id=(0, 0, 3))
    pieces = list(_cut("exp_avg", whole.flatten()[first:last], first, [shard]))
    assert [tuple(piece.local_shape) for piece in pieces] == shapes
    assert all(piece.replica_id == (0, 0, 0) for piece in pieces)
