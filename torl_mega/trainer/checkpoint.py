"""Distributed checkpoints: any layout in, any layout out; a crash in the middle of saving never harms the last good one.

    <run>/checkpoints/step_000010/      Megatron's torch_dist files (weights, optimizer, schedule, RNG), fully reshardable
                     .../extra.json     what the loop keeps (steps done, prompt cursor, ...)
                     .../manifest.json  model, layout, and size and CRC-32 of every other file; written last

A checkpoint is built in `.step_000010.tmp`, synced to disk and renamed, so a folder of the final name is complete; `latest`
takes the newest one that has a manifest. With `async_save` a forked process writes while training goes on, and the rename
happens at the first `poll` after it is done. Loading first compares model, sizes and checksums with the manifest.
Limits: needs a file system that all ranks share.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torl_mega.config import CheckpointConfig
from torl_mega.errors import CheckpointError
from torl_mega.trainer import parallel
from torl_mega.trainer.hf_io import fsync, replace_folder
from torl_mega.trainer.layout import ModelShape

_STEP = re.compile(r"step_(\d+)")
_MANIFEST, _EXTRA = "manifest.json", "extra.json"


def latest(root: Path) -> Path | None:
    """The complete checkpoint with the highest step below `root`, or None."""
    found = complete(root)
    return found[-1] if found else None


def complete(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest step first."""
    if not root.is_dir():
        return []
    named = [(int(m[1]), p) for p in root.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / _MANIFEST).is_file()]
    return [p for _, p in sorted(named)]


@dataclass(frozen=True, slots=True)
class _Save:
    temporary: Path
    path: Path
    extra: str  # JSON


class Checkpoints:
    """Saves and loads what one trainer rank holds; every method is a collective."""

    def __init__(self, config: CheckpointConfig, shape: ModelShape) -> None:
        self.config = config
        self.shape = shape
        self._queue: Any = None
        self._pending: list[_Save] = []  # under way, oldest first

    def save(self, path: Path, model: Sequence[Any], optimizer: Any, schedule: Any, extra: Mapping[str, Any]) -> None:
        """Write a checkpoint to `path`; with async_save return as soon as the state is copied."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy

        self.poll(wait=True)
        temporary = path.with_name(f".{path.name}.tmp")
        text = parallel.share(lambda: _prepare(temporary, extra))
        metadata = _metadata()
        state = _state(model, optimizer, schedule, metadata, loading=False)
        request = dist_checkpointing.save(
            state,
            str(temporary),
            get_default_save_sharded_strategy("torch_dist"),
            async_sharded_save=self.config.async_save,
            content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
        )
        self._pending.append(_Save(temporary, path, text))
        if self.config.async_save:
            self._async_queue().schedule_async_request(request)
        else:
            self._publish()

    def poll(self, *, wait: bool = False) -> None:
        """Publish a checkpoint whose writing has ended; with `wait`, end it."""
        if self._queue is None or not self._pending:
            return
        self._queue.maybe_finalize_async_calls(blocking=wait)
        if self._queue.get_num_unfinalized_calls() == 0:
            self._publish()

    def load(self, path: Path, model: Sequence[Any], optimizer: Any, schedule: Any) -> Mapping[str, Any]:
        """Fill model, optimizer, schedule and RNG; returns `extra`. Raises CheckpointError before anything is changed
        when the checkpoint is missing, damaged or of another model."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy

        self.verify(path)
        metadata = {**_metadata(), **dist_checkpointing.load_content_metadata(str(path))}
        state = _state(model, optimizer, schedule, metadata, loading=True)
        error: BaseException | None = None
        try:
            loaded: Any = dist_checkpointing.load(state, str(path), get_default_load_sharded_strategy(str(path)))
            for n, chunk in enumerate(model):
                chunk.module.load_state_dict(loaded[_chunk_name(n, len(model))], strict=True)
            with torch.no_grad():  # fp32 parameters are views that must not be copied into under autograd
                optimizer.load_state_dict(loaded["optimizer"])
            schedule.load_state_dict(loaded["schedule"])
            _restore_rng(loaded["rng"])
        except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError, OSError) as exc:
            error = CheckpointError(f"{path}: cannot be loaded: {_one_line(exc)}")
        parallel.raise_together(error)
        return json.loads((path / _EXTRA).read_text())

    def verify(self, path: Path) -> None:
        """Compare model, file sizes and checksums with the manifest; the ranks share the reading."""
        manifest = parallel.share(lambda: _read_manifest(path, self.shape))
        error: BaseException | None = None
        files = sorted(manifest["files"].items())
        for name, wanted in files[_rank() :: parallel.world_size()]:
            found = _fingerprint(path / name)
            if found != wanted:
                size = "is missing" if found is None else f"has {found['size']} bytes, crc {found['crc32']}"
                error = CheckpointError(
                    f"{path / name} {size}; the manifest says {wanted['size']} bytes, crc {wanted['crc32']}: "
                    "the checkpoint is damaged, remove its folder to resume from the one before"
                )
                break
        parallel.raise_together(error)

    def _async_queue(self) -> Any:
        if self._queue is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            # persistent workers divide by the number of CUDA devices; a forked one works everywhere
            self._queue = AsyncCallsQueue(persistent=False)
        return self._queue

    def _publish(self) -> None:
        save = self._pending.pop(0)
        temporary = save.temporary
        parallel.share(lambda: (temporary / _EXTRA).write_text(save.extra))
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        mine = {str(p.relative_to(temporary)): _fingerprint(p) for p in files[_rank() :: parallel.world_size()]}
        for name in mine:
            fsync(temporary / name)
        prints: list[Any] = [mine]
        if parallel.world_size() > 1:
            prints = [None] * parallel.world_size()
            dist.all_gather_object(prints, mine, group=parallel.share_group())
        parallel.share(lambda: _finish(temporary, save.path, self.shape, prints, self.config.keep_last))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _prepare(temporary: Path, extra: Mapping[str, Any]) -> str:
    """An empty folder to write to; returns `extra` as text."""
    try:
        text = json.dumps(dict(extra))
    except TypeError as exc:
        raise CheckpointError(f"what the loop wants to keep is not JSON: {exc}") from None
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as exc:
        raise CheckpointError(f"{temporary}: cannot be written ({exc}); free space or choose another runs_dir") from None
    return text


def _finish(temporary: Path, path: Path, shape: ModelShape, prints: list[Any], keep_last: int) -> None:
    files = {name: found for part in prints for name, found in part.items()}
    manifest = {"format": 1, "model": _model_record(shape), "files": files}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    replace_folder(temporary, path)
    for old in complete(path.parent)[:-keep_last]:
        if old != path:
            shutil.rmtree(old, ignore_errors=True)


def _model_record(shape: ModelShape) -> dict[str, Any]:
    """What must agree between a checkpoint and the model it is loaded into."""
    record = asdict(shape)
    return {k: record[k] for k in ("architecture", "num_layers", "hidden", "num_heads", "num_kv_groups", "head_dim",
                                   "ffn", "vocab", "tied")}  # fmt: skip


def _read_manifest(path: Path, shape: ModelShape) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        files, model = dict(manifest["files"]), dict(manifest["model"])
    except OSError:
        raise CheckpointError(f"{path}: no {_MANIFEST}, so the checkpoint is not complete; take another step_* folder") from None
    except (ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{path / _MANIFEST} is damaged: {exc!r}; take another step_* folder") from None
    mine = _model_record(shape)
    differs = [f"{k} {model.get(k)} (model.path: {v})" for k, v in mine.items() if model.get(k) != v]
    if differs:
        raise CheckpointError(f"{path} belongs to another model: {', '.join(differs)}; set model.path or name to match")
    return {"files": files}


def _fingerprint(file: Path) -> dict[str, int] | None:
    """Size and CRC-32, read in pieces; None when the file is not there."""
    crc = size = 0
    try:
        with file.open("rb") as handle:
            while piece := handle.read(1 << 22):
                crc = zlib.crc32(piece, crc)
                size += len(piece)
    except OSError:
        return None
    return {"size": size, "crc32": crc}


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _chunk_name(n: int, chunks: int) -> str:
    return "model" if chunks == 1 else f"model{n}"


def _state(
    model: Sequence[Any], optimizer: Any, schedule: Any, metadata: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    weights = {_chunk_name(n, len(model)): c.module.sharded_state_dict(metadata=metadata) for n, c in enumerate(model)}
    state: dict[str, Any] = dict(weights)
    with _unpadded_indices(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    state["schedule"] = schedule.state_dict()
    state["rng"] = parallel.share(_rng_state)  # rank 0's: the trainer itself draws nothing, and common state must agree
    return state


@contextmanager
def _unpadded_indices(optimizer: Any) -> Iterator[None]:
    """Megatron (0.16.1 and 0.19.2) gathers the optimizer state with the padding between buckets cut out, then slices it
    with offsets that count the padding: with several buckets of which an early one is padded (tied embeddings over
    pipeline stages, or overlap on data-parallel sizes that do not divide a bucket) it saves shifted states and logs
    "can lead to data corruption". Give it offsets without padding while it saves."""
    kept = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for buffer in getattr(part, "buffers", []):
            starts = np.cumsum([0, *(b.numel_unpadded for b in buffer.buckets)])
            shift = [b.offset - int(start) for b, start in zip(buffer.buckets, starts, strict=False)]
            kept.append((buffer, buffer.param_index_map))
            buffer.param_index_map = {
                p: (start - shift[b], end - shift[b], b) for p, (start, end, b) in buffer.param_index_map.items()
            }
    try:
        yield
    finally:
        for buffer, original in kept:
            buffer.param_index_map = original


def _rng_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _one_line(exc: BaseException) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:300]
