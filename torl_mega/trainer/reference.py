"""The reference model of the KL: a second set of weights in host memory that takes the policy's place for one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Reference:
    """This rank's share of the reference model's weights, in the order of the parameters that it was made from."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        """Copies the parameters, all of one type, to pieces of one buffer, pinned so that a GPU moves it at the bus's speed."""
        self._parameters = list(parameters)
        sizes, (dtype,) = [p.numel() for p in parameters], {p.dtype for p in parameters}
        buffer = torch.empty(sum(sizes), dtype=dtype, pin_memory=self._on_gpu)
        self.weights = [piece.view_as(p) for piece, p in zip(buffer.split(sizes), parameters, strict=True)]
        self.take([p.detach() for p in parameters])

    def take(self, weights: Sequence[torch.Tensor]) -> None:
        """These become the reference's weights."""
        for kept, weight in zip(self.weights, weights, strict=True):
            kept.copy_(weight)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model holds the reference's weights meanwhile. No gather of updated weights may be under way."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @property
    def _on_gpu(self) -> bool:
        return self._parameters[0].is_cuda

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges both sets of weights in place and bit for bit; a second call undoes the first."""
        for parameter, kept in zip(self._parameters, self.weights, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(kept, non_blocking=True)
            kept.copy_(current, non_blocking=True)  # on the same stream, so after `kept` was read
        if self._on_gpu:
            torch.cuda.synchronize()
