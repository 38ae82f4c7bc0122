"""What Megatron's layers with experts ask of CUDA and NCCL, on a CPU over gloo.

Sizes of an all-to-all are wanted as numbers of the host, and gathers over the ranks of one expert have parts of different
sizes, which gloo refuses: they travel padded to the largest.

Contract: `install` patches three functions of Megatron by name; the results are NCCL's. Checked with 0.16.1 and 0.19.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Called by backend.install, once per process."""
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    patched: Any = mappings
    patched._gather_along_first_dim = _padded_gather(mappings._gather_along_first_dim)
    patched._reduce_scatter_along_first_dim = _padded_reduce_scatter(mappings._reduce_scatter_along_first_dim)
    patched = dispatcher
    patched.maybe_move_tensor_to_cpu = _as_numbers


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """In the place of `maybe_move_tensor_to_cpu`, which leaves alone what is on the CPU already."""
    del record_stream
    return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _padded_gather(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def gather(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(n) for n in output_split_sizes]
        parts = [_zeros(input_, max(sizes)) for _ in sizes]
        dist.all_gather(parts, _padded(input_, max(sizes)), group=group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    return gather


def _padded_reduce_scatter(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def reduce_scatter(
        input_: torch.Tensor,
        group: Any,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        sizes = [int(n) for n in input_split_sizes]
        parts = [_padded(part, max(sizes)) for part in input_.split(sizes)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=group)
        return mine[: sizes[group.rank()]]

    return reduce_scatter


def _zeros(like: torch.Tensor, rows: int) -> torch.Tensor:
    return like.new_zeros(rows, *like.shape[1:])


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, _zeros(tensor, rows - tensor.size(0))])
