"""The distributed optimizer's state in a checkpoint: each rank saves and loads what it holds, and gathers nothing.

A rank holds one flat range of a parameter. Of a matrix that is at most three rectangles, each a chunk of the saved tensor:

    [4, 5] over two ranks, cut after element 8:     0 0 0 0 0 │ first rank: row 0, start of row 1
                                                    0 0 0 1 1 │
                                                    1 1 1 1 1 │ second rank: end of row 1, rows 2 and 3
                                                    1 1 1 1 1 │

Contract: keys, global shapes and numbers are those of Megatron's `fully_reshardable`, which gathers the state of all
data-parallel ranks on each of them; only the chunks differ. So any layout loads what any other has saved, in either way.
Limits: parameters of one or two dimensions, as dense models have.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

_STATES = ("param", "exp_avg", "exp_avg_sq")


def keep_sharded(optimizer: Any) -> None:
    """Makes Megatron's distributed optimizer (if it is one) save and load its state in pieces."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part, "sharded_param_state_fully_reshardable"):
            part.sharded_param_state_fully_reshardable = partial(_pieces_of, part)
            part.load_parameter_state_from_fully_reshardable = partial(_fill, part)


def _held(part: Any) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """The parameters of which this rank holds a range, and where in the flattened parameter it starts."""
    for of_types in part.gbuf_ranges:
        for of_buckets in of_types.values():
            for bucket in of_buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start


def _pieces_of(part: Any, weights: Mapping[str, Any], is_loading: bool = False, metadata: Any = None) -> dict[int, Any]:
    """Per held parameter the pieces of its states. They are views of the optimizer's tensors, and loading fills these."""
    del is_loading, metadata  # Megatron's signature
    saved = {id(w.data): w for w in nested_values(weights) if isinstance(w, ShardedTensor | ShardedTensorFactory)}
    state: dict[int, Any] = {}
    for index, (parameter, start) in enumerate(_held(part)):
        tensors = part._get_main_param_and_optimizer_states(parameter)
        weight = saved[id(parameter)]
        # a factory saves one parameter as several tensors along its first axis (gate and up)
        shards = weight.build() if isinstance(weight, ShardedTensorFactory) else [weight]
        state[index] = {name: list(_cut(name, tensors[name].detach(), start, shards)) for name in _STATES}
    return state


def _fill(part: Any, state: Mapping[int, Any]) -> None:
    """Sets the held ranges to the loaded pieces."""
    for index, (parameter, _) in enumerate(_held(part)):
        pieces = {name: torch.cat([t.reshape(-1) for t in state[index][name]]) for name in _STATES}
        part._set_main_param_and_optimizer_states(parameter, pieces)
    if hasattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers"):  # offloaded: Adam steps on copies
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def _cut(name: str, flat: torch.Tensor, start: int, shards: Sequence[ShardedTensor]) -> Iterator[ShardedTensor]:
    """The range `flat`, which starts at `start` of the flattened parameter, as pieces of the tensors it is saved in."""
    stop, end = start + flat.numel(), 0
    for shard in shards:
        begin, end = end, end + math.prod(shard.local_shape)
        width = math.prod(shard.local_shape[1:])
        while start < min(stop, end):
            left = min(stop, end) - start
            row, column = divmod(start - begin, width)
            columns = min(width - column, left)
            rows = max(1, left // width) if column == 0 else 1
            yield _piece(name, flat[: rows * columns], shard, (row, column), (rows, columns))
            flat, start = flat[rows * columns :], start + rows * columns


def _piece(
    name: str, flat: torch.Tensor, shard: ShardedTensor, corner: tuple[int, int], shape: tuple[int, int]
) -> ShardedTensor:
    """One rectangle of the tensor that `shard` describes."""
    dims, replica = len(shard.global_shape), shard.replica_id  # replica: (pipeline, tensor, data)
    layer = shard.prepend_axis_num  # the axis of layers, of which a shard is one
    local = ((1,) * layer + shape)[:dims]
    inside = ((0,) * layer + corner)[:dims]
    return replace(
        shard,
        key=f"optimizer.state.{name}.{shard.key}",
        data=flat.view(local),
        dtype=flat.dtype,
        local_shape=local,
        global_offset=tuple(a + b for a, b in zip(shard.global_offset, inside, strict=True)),
        axis_fragmentations=None,  # no regular grid
        prepend_axis_num=0,
        replica_id=(*replica[:2], 0),  # no other data-parallel rank has it
    )
