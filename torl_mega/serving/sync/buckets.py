"""Splits a stream of named tensors into buckets of at most `max_bytes`, whose tensors can be laid end to end as bytes.

A tensor larger than a bucket is a bucket of its own: SGLang's loaders take whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from torl_mega.interfaces import NamedTensor


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Tensors in wire order: widest element first, so that every one starts aligned to its own element size."""

    named: tuple[NamedTensor, ...]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.named]

    @property
    def dtypes(self) -> list[str]:
        return [dtype_name(tensor) for _, tensor in self.named]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(tensor.shape) for _, tensor in self.named]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.named)

    def flatten_into(self, buffer: torch.Tensor) -> torch.Tensor:
        """Copies all tensors into `buffer` ([>= num_bytes] uint8); returns the first `num_bytes` of it."""
        offset = 0
        for _, tensor in self.named:
            target = buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
            offset += tensor.nbytes
        return buffer[:offset]


def dtype_name(tensor: torch.Tensor) -> str:
    """torch's name of the element type, e.g. bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


def make_buckets(tensors: Iterable[NamedTensor], max_bytes: int) -> Iterator[Bucket]:
    """Buckets in the stream's order. Memory: the tensors of one bucket are held until it is full."""
    held: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_bytes:
            yield _bucket(held)
            held, size = [], 0
        held.append((name, tensor.detach().contiguous()))
        size += tensor.nbytes
    if held:
        yield _bucket(held)


def _bucket(named: list[NamedTensor]) -> Bucket:
    return Bucket(tuple(sorted(named, key=lambda item: -item[1].element_size())))
