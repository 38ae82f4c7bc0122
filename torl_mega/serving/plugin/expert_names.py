"""Where a tensor of an expert goes, found at once: SGLang's loaders compare its name with that of every expert in turn.

The loaders of Qwen3-MoE and Qwen2-MoE (srt/models/qwen3_moe.py, qwen2_moe.py of 0.5.23) go through a list of three entries per
expert for each tensor they are given: 7 million comparisons for 48 layers of 128 experts. `make_quick` lets them see of that
list the entries that fit the tensor at hand, by its name.

Contract: what is loaded where stays as it is; a name of another form is compared with the whole list. The loaders take their
tensors one at a time, which is what ties the list to the tensor at hand; one that read ahead would be found out by the checksums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

_MODULES = ("sglang.srt.models.qwen3_moe", "sglang.srt.models.qwen2_moe")
_at_hand: list[str] = [""]


class QuickList(list[Any]):
    """(parameter, part of the name, expert, shard) of all experts; iterates over those that fit the tensor at hand."""

    def __init__(self, entries: Iterable[Any]) -> None:
        super().__init__(entries)
        self._by_part: dict[str, list[Any]] = {}
        for entry in list.__iter__(self):
            self._by_part.setdefault(entry[1], []).append(entry)

    def __iter__(self) -> Iterator[Any]:
        _, found, rest = _at_hand[0].rpartition(".experts.")
        if not found:
            return list.__iter__(self) if "experts." in _at_hand[0] or not _at_hand[0] else iter(())
        entries = self._by_part.get(f"experts.{rest[: rest.rfind('.') + 1]}")
        return list.__iter__(self) if entries is None else iter(entries)


def make_quick(model: Any) -> None:
    """For the model's class, once per process; nothing for other models."""
    kind = type(model)
    if kind.__module__ not in _MODULES or getattr(kind.load_weights, "torl_quick", False):
        return
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    experts: Any = FusedMoE
    original, load = experts.make_expert_params_mapping, kind.load_weights

    @functools.wraps(load)
    def load_weights(self: Any, weights: Iterable[tuple[str, Any]], *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, _one_at_a_time(weights), *args, **kwargs)
        finally:
            _at_hand[0] = ""

    load_weights.torl_quick = True  # type: ignore[attr-defined]
    kind.load_weights = load_weights
    experts.make_expert_params_mapping = staticmethod(lambda *a, **k: QuickList(original(*a, **k)))


def _one_at_a_time(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, tensor in weights:
        _at_hand[0] = name
        yield name, tensor
