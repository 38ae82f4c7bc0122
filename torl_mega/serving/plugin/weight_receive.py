"""Server side of two transports: weights that are broadcast, and on a CPU weights in memory that a rank beside us shares.

Broadcast weights are received where the model keeps them, without a copy in between.

SGLang's own receiver takes a bucket into memory of its own and lets the model's loader copy it into the parameters. The
map that `held_weights.trace_loader` makes says where each tensor goes, so one that fills a single contiguous piece of a
parameter (every tensor on a server with one rank; norms and rows of the embedding elsewhere) is received there; the rest
goes through the loader. That halves a server's work in a sync and saves the memory of a bucket.

Runs in SGLang's scheduler processes, as an AROUND hook on `WeightUpdater.receive_weights_from_distributed`
(srt/model_executor/model_runner_components/weight_updater.py); asked for with `load_format` = "torl_in_place", which
expects the broadcasts that `trips` says, as bytes, and one of a single byte, which connects the group, where there are none. With
"torl_shared" in its place `group_name` has a file for each of our ranks, with commas, in which the bucket lies end to end:
/proc/PID/fd/N, memory that goes with the process that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from torl_mega.serving.plugin.held_weights import Copy, spec_line, trace_loader

IN_PLACE, SHARED = "torl_in_place", "torl_shared"
SMALL = 2**17  # bytes of a tensor that does not travel alone


def receive(
    original: Callable[..., Any],
    updater: Any,
    *,
    names: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    group_name: str,
    load_format: str | None = None,
) -> Any:
    """The hook. Returns the (name, tensor) pairs that the model's loader has still to load."""
    if load_format == SHARED:
        return _mapped(group_name.split(",")[updater.tp_rank], names, dtypes, shapes)
    if load_format != IN_PLACE:
        return original(
            updater, names=names, dtypes=dtypes, shapes=shapes, group_name=group_name, load_format=load_format
        )
    group = updater._model_update_group[group_name]
    if not names:
        dist.broadcast(torch.zeros(1, dtype=torch.uint8, device=updater.device), src=0, group=group)
        return []
    places = _places(updater.get_model(), names, dtypes, shapes)
    targets, for_loader = [], []
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        target = places.get(name)
        if target is None:
            target = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=updater.device)
            for_loader.append((name, target))
        targets.append(target.view(-1).view(torch.uint8))
    works, arrived = [], []
    for trip in trips([target.numel() for target in targets]):
        flat = targets[trip[0]]
        if len(trip) > 1:
            flat = torch.empty(sum(targets[n].numel() for n in trip), dtype=torch.uint8, device=updater.device)
            arrived.append((flat, [targets[n] for n in trip]))
        works.append(dist.broadcast(flat, src=0, group=group, async_op=True))
    _wait_for_all(works)
    for flat, parts in arrived:
        for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(piece)
    return for_loader


def trips(sizes: Sequence[int]) -> list[list[int]]:
    """Which tensors of a bucket, by number, travel in one broadcast, given their bytes: each large one alone, so that it is
    received where it belongs, and then all small ones, whose broadcasts would be nothing but latency."""
    small = [n for n, size in enumerate(sizes) if size < SMALL]
    return [[n] for n, size in enumerate(sizes) if size >= SMALL] + ([small] if small else [])


def _mapped(
    path: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, in the memory itself; the model's loader copies them. Raises RuntimeError without such a file."""
    types = [getattr(torch, dtype) for dtype in dtypes]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, types, strict=True)]
    whole = torch.from_file(path, shared=True, size=sum(sizes), dtype=torch.uint8)
    parts = zip(names, whole.split(sizes), types, shapes, strict=True)
    return [(name, _as(part, dtype).view(tuple(shape))) for name, part, dtype, shape in parts]


def _as(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as numbers, copied where they do not begin at a whole one."""
    return (part if part.storage_offset() % dtype.itemsize == 0 else part.clone()).view(dtype)


def _wait_for_all(works: Sequence[Any]) -> None:
    """Raises the first failure, but only when nothing is received into parameters any more: the group is destroyed next."""
    failures = []
    for work in works:
        try:
            work.wait()
        except RuntimeError as exc:
            failures.append(exc)
    if failures:
        raise failures[0]


def _places(
    model: torch.nn.Module, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """name -> the piece of a parameter that holds exactly this tensor, where there is one."""
    lines = [spec_line(*described) for described in zip(names, dtypes, shapes, strict=True)]
    copies: dict[str, list[Copy]] = {}
    for copy in trace_loader(model, lines, complete=False).copies:
        copies.setdefault(copy.source, []).append(copy)
    parameters = dict(model.named_parameters())
    places = {}
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        if len(copies.get(name, ())) != 1:
            continue
        (copy,) = copies[name]
        place = parameters[copy.parameter].data.as_strided(copy.size, copy.stride, copy.offset)
        whole = copy.source_offset == 0 and math.prod(copy.size) == math.prod(shape)
        in_order = copy.source_stride == torch.empty(copy.size, device="meta").stride()
        if whole and in_order and place.is_contiguous() and place.dtype == getattr(torch, dtype):
            places[name] = place
    return places
