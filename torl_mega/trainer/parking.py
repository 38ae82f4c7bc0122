"""This rank's weights, gradients and optimizer state on their way to host memory and back, while servers have the GPU.

Tensors stay what they are, views and all: only their storages are emptied (resized to 0 bytes) and filled again, so whoever holds
a view of a parameter or of a gradient buffer finds the same bits in it. Gradients are not kept, as Megatron's own
`offload_grad_buffers` does not: an update begins with none. Megatron's `offload_to_cpu` of the optimizer is no use here: it puts
other tensors in place of those that the distributed optimizer has views of, in pageable memory, and does nothing on a CPU.

Contract: between verbs only; no gather of weights or reduction of gradients is under way. Host memory is one buffer per part,
made when it is first parked and kept, pinned where the tensors are on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

Parts = frozenset[str]
_ALIGN = 512


class Parking:
    """What is on the device, of `weights`, `gradients` and `optimizer`: all of it when this is made."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any) -> None:
        """`chunks`: Megatron's DDP around each model chunk."""
        self._chunks, self._optimizer = list(chunks), optimizer
        self._lots = {"weights": _Lot(), "optimizer": _Lot()}
        self._has_gradients = True

    @property
    def on_device(self) -> Parts:
        parked = {name for name, lot in self._lots.items() if lot.storages}
        return frozenset(
            {"weights", "gradients", "optimizer"} - parked - (set() if self._has_gradients else {"gradients"})
        )

    def hold(self, parts: Parts) -> None:
        """Exactly these parts are on the device afterwards. What leaves does so first."""
        if self._has_gradients and "gradients" not in parts:
            for chunk in self._chunks:
                chunk.offload_grad_buffers(empty_cache=False)
            self._has_gradients = False
        here = self.on_device
        for name in ("weights", "optimizer"):
            if name in here - parts:
                self._lots[name].park(self._storages(name))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # another process is to have it
        for name in ("weights", "optimizer"):
            if name in parts - here:
                self._lots[name].bring_back()
        if not self._has_gradients and "gradients" in parts:
            for chunk in self._chunks:
                chunk.restore_grad_buffers()
            self._has_gradients = True

    def _storages(self, name: str) -> list[torch.UntypedStorage]:
        weights = _storages_of(p.data for chunk in self._chunks for p in chunk.module.parameters())
        if name == "weights":
            return list(weights.values())
        # fp32 weights are their own masters: the distributed optimizer's are views of them
        gradients = _storages_of(b.grad_data for chunk in self._chunks for b in chunk.buffers)
        state = _storages_of(tensor for tensor in _tensors_of(self._optimizer))
        return [storage for key, storage in state.items() if key not in weights and key not in gradients]


class _Lot:
    """A host buffer and what it holds the bytes of."""

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []
        self._buffer: torch.Tensor | None = None

    def park(self, storages: list[torch.UntypedStorage]) -> None:
        self._sizes, on_gpu = [s.nbytes() for s in storages], any(s.device.type == "cuda" for s in storages)
        total = sum(_padded(size) for size in self._sizes)
        if self._buffer is None or self._buffer.numel() < total:
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        for storage, place in zip(storages, self._places(), strict=True):
            place.copy_(_bytes_of(storage), non_blocking=True)
        _wait(on_gpu)
        for storage in storages:
            storage.resize_(0)
        self.storages = storages

    def bring_back(self) -> None:
        for storage, place in zip(self.storages, self._places(), strict=True):
            storage.resize_(place.numel())
            _bytes_of(storage).copy_(place, non_blocking=True)
        _wait(any(s.device.type == "cuda" for s in self.storages))
        self.storages = []

    def _places(self) -> Iterator[torch.Tensor]:
        start = 0
        assert self._buffer is not None
        for size in self._sizes:
            yield self._buffer[start : start + size]
            start += _padded(size)


def _tensors_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """Main weights and states of Megatron's optimizer on the device where weights are."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        tensors = [p.data for group in inner.param_groups for p in group["params"]]
        tensors += [
            value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)
        ]
        yield from (tensor for tensor in tensors if tensor.device.type == kind and tensor.numel() > 1)


def _storages_of(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each storage once, by its identity."""
    return {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors) if s.nbytes()}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
