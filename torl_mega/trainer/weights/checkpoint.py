"""Saves and loads Megatron's distributed checkpoints: saved in any layout, loaded in any other.

    <run>/checkpoints/step_00010/       torch_dist files (weights, optimizer, schedule, RNG), fully reshardable
                     .../extra.json     what the loop keeps (steps done, prompt cursor, ...)
                     .../manifest.json  see checkpoint_files.py

Contract: every method is a collective. Each rank writes and reads its share: the optimizer state it holds, and its part of
the weights that data-parallel ranks have in common; a save adds that share to a rank's host memory and nothing to its GPU's.
On a CPU a run resumed in the same layout goes on bit for bit (on GPUs see `trainer.deterministic`), in another layout to
rounding. With `async_save` a forked process writes while training goes on, and the checkpoint appears at the first `poll`
after it is done. Loading compares model, sizes and checksums with the manifest before it changes anything. A save that
fails on any rank is one CheckpointError on all of them, and its folder is removed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import core as megatron_files
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from torl_mega.config import CheckpointConfig
from torl_mega.errors import CheckpointError
from torl_mega.layout import ModelShape
from torl_mega.process.start import die_with_parent
from torl_mega.run.files import temporary_for
from torl_mega.trainer import parallel
from torl_mega.trainer.weights import checkpoint_files as files
from torl_mega.trainer.weights import optimizer_state
from torl_mega.trainer.weights.checkpoint_files import complete, latest

__all__ = ["Checkpoints", "complete", "latest", "load_weights", "save_weights"]

_ERRORS = (RuntimeError, KeyError, ValueError, AssertionError, pickle.UnpicklingError, OSError)


@dataclass(frozen=True, slots=True)
class _Save:
    """A checkpoint that is being written."""

    temporary: Path
    path: Path
    extra: str  # JSON


class Checkpoints:
    """Saves and loads what one trainer rank holds."""

    def __init__(self, config: CheckpointConfig, shape: ModelShape, hf_config: Mapping[str, Any]) -> None:
        self.config = config
        self.shape = shape
        self._record = files.record_of(shape, hf_config, "training")
        self._queue: Any = None
        self._pending: _Save | None = None  # under way

    def save(
        self,
        path: Path,
        model: Sequence[Any],
        optimizer: Any,
        schedule: Any,
        extra: Mapping[str, Any],
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint to `path`; with async_save returns as soon as the state is copied. `reference`: the
        `reference_state` of a run whose KL reference is not the start. Raises CheckpointError, for an earlier asynchronous
        save too."""
        self.poll(wait=True)
        save = _Save(temporary_for(path), path, files.as_json(extra))
        with _writing(save.temporary, path):
            parallel.share(lambda: files.prepare(save.temporary))
            metadata = _metadata()
            state = _training_state(model, optimizer, schedule, metadata, loading=False)
            if reference is not None:
                state["reference"] = reference
            request = _save_request(save.temporary, state, metadata)
            if self.config.async_save:
                self._async_queue().schedule_async_request(request)
                self._pending = save
            else:
                request.execute_sync()
                self._publish(save)

    def poll(self, *, wait: bool = False) -> None:
        """Publishes a checkpoint whose writing has ended; with `wait`, waits for that first. Raises CheckpointError."""
        save, self._pending = self._pending, None
        if save is None:
            return
        with _writing(save.temporary, save.path):
            self._queue.maybe_finalize_async_calls(blocking=wait)
            if self._queue.get_num_unfinalized_calls():
                self._pending = save
            else:
                self._publish(save)

    def load(
        self,
        path: Path,
        model: Sequence[Any],
        optimizer: Any,
        schedule: Any,
        take_reference: Callable[[Sequence[Mapping[str, torch.Tensor]]], None] | None = None,
    ) -> Mapping[str, Any]:
        """Fills model, optimizer, schedule and RNG; returns `extra`. `take_reference` is called with the saved
        reference, per chunk by name. Raises CheckpointError before anything is changed when the checkpoint is missing, damaged, of
        another model or without a training state."""
        manifest = _checked_manifest(path, self.shape)
        if manifest["content"] != "training":
            raise CheckpointError(f"{path} holds weights only; convert it to HF and name that folder in model.path")
        with _one_line_errors(f"{path}: cannot be loaded: {{}}"):
            metadata = {**_metadata(), **_content_metadata(path)}
            state = _training_state(model, optimizer, schedule, metadata, loading=True)
            if take_reference is not None:
                state["reference"] = reference_state(model)
            loaded = _read(path, state)
            if take_reference is not None:
                take_reference([loaded["reference"][_chunk_name(n, len(model))] for n in range(len(model))])
            _fill_weights([chunk.module for chunk in model], loaded)
            with torch.no_grad():  # fp32 parameters are views that must not be copied into under autograd
                optimizer.load_state_dict(loaded["optimizer"])
            schedule.load_state_dict(loaded["schedule"])
            _restore_rng(loaded["rng"])
        return json.loads((path / files.EXTRA).read_text())

    def _async_queue(self) -> Any:
        if self._queue is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            # persistent workers divide by the number of CUDA devices; a forked one works everywhere
            self._queue = AsyncCallsQueue(persistent=False)
        return self._queue

    def _publish(self, save: _Save) -> None:
        files.publish(save.temporary, save.path, save.extra, self._record, self.config.keep_last)


def reference_state(model: Sequence[Any]) -> dict[str, Any]:
    """Copies of the weights that the model holds, to be saved beside others under names of their own."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    def copied(part: Any) -> Any:
        if isinstance(getattr(part, "data", None), torch.Tensor):
            part.data = part.data.detach().clone()
        return part

    state = _weights_state([chunk.module for chunk in model], _metadata())
    dict_list_map_inplace(copied, state)
    add_prefix_for_sharding(state, "reference.")
    return state


def save_weights(path: Path, chunks: Sequence[Any], shape: ModelShape, hf_config: Mapping[str, Any]) -> None:
    """Weights alone of bare model chunks, for conversion."""
    temporary = temporary_for(path)
    with _writing(temporary, path):
        parallel.share(lambda: files.prepare(temporary))
        metadata = _metadata()
        _save_request(temporary, _weights_state(chunks, metadata), metadata).execute_sync()
        files.publish(temporary, path, files.as_json({}), files.record_of(shape, hf_config, "weights"), None)


def load_weights(path: Path, chunks: Sequence[Any], shape: ModelShape) -> None:
    """Loads the weights alone of any checkpoint into bare model chunks of any layout."""
    _checked_manifest(path, shape)
    with _one_line_errors(f"{path}: cannot be loaded: {{}}"):
        loaded = _read(path, _weights_state(chunks, {**_metadata(), **_content_metadata(path)}))
        _fill_weights(chunks, loaded)


def _checked_manifest(path: Path, shape: ModelShape) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        manifest = files.read_manifest(path)
        files.check_model(path, manifest, shape)
        return manifest

    manifest = parallel.share(read)
    files.check_files(path, manifest)
    return manifest


@contextmanager
def _one_line_errors(message: str) -> Iterator[None]:
    """Turns what fails on one rank or on all into one CheckpointError on every rank: `message` with the reason put in."""
    error: BaseException | None = None
    try:
        yield
    except CheckpointError as exc:
        error = exc
    except _ERRORS as exc:
        error = CheckpointError(message.format(" ".join(f"{type(exc).__name__}: {exc}".split())[:300]))
    parallel.raise_together(error)


@contextmanager
def _writing(temporary: Path, path: Path) -> Iterator[None]:
    """What fails while a checkpoint is written: one line on every rank, and nothing left of it."""
    try:
        with _one_line_errors(f"{path}: cannot be written: {{}}; free space or choose another runs_dir"):
            yield
    except CheckpointError:
        if parallel.is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


class _Writer(TorchDistSaveShardedStrategy):
    """Megatron's writer, whose end raises on every rank what fails on one. In Megatron's own the others wait for rank 0 while
    it cannot write its last files."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: Any) -> Any:
        request = super()._get_save_and_finalize_callbacks(writer, planned, *strategy)
        request.finalize_fns[:] = [lambda: _finish(writer, planned[1])]
        return request


def _finish(writer: Any, metadata: Any) -> None:
    """Rank 0 writes what was written where; raises when a rank could not write its share."""
    written = parallel.gather(writer.retrieve_write_results())

    def finish() -> None:
        failed = [part[0] for part in written if isinstance(part, tuple)]  # (exception, stack)
        if failed:
            raise failed[0]
        writer.finish(metadata, written)
        megatron_files.save_config(megatron_files.CheckpointingConfig("torch_dist", 1), str(writer.checkpoint_dir))

    parallel.share(finish)


def _save_request(folder: Path, state: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """The state, planned and shared out over the ranks, as a request to write it now or in a process of its own."""
    parallel.raise_together(_cannot_start_helper())
    # From 0.17 on the writer is chosen by name and its default is that of nvidia-resiliency-ext, which may be absent
    # (serialization.py, strategies/torch.py:get_async_strategy of 0.19.2). Megatron's own is the one `_cannot_start_helper` keeps.
    named = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    strategy: dict[str, Any] = {"async_strategy": "mcore"} if named else {}
    with _common_state_written_together():
        request: Any = dist_checkpointing.save(
            state,
            str(folder),
            FullyParallelSaveStrategyWrapper(_Writer("torch_dist", 1), metadata["dp_cp_group"]),
            async_sharded_save=True,
            content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
            **strategy,
        )
    del request.finalize_fns[1:]  # metadata.json, which `_finish` writes
    return request


@contextmanager
def _common_state_written_together() -> Iterator[None]:
    """Rank 0 alone writes common.pt (strategies/common.py of 0.16.1; 0.19.2 shares it out like the rest) while the others go
    on to the next collective and would wait there for ever when it cannot."""
    owner: Any = getattr(common, "TorchCommonSaveStrategy", None)
    if owner is None:
        yield
        return
    original = owner.save_common

    def together(self: Any, *args: Any) -> None:
        error: BaseException | None = None
        try:
            original(self, *args)
        except _ERRORS as exc:
            error = exc
        parallel.raise_together(error)

    owner.save_common = together
    try:
        yield
    finally:
        owner.save_common = original


def _cannot_start_helper() -> CheckpointError | None:
    """Starts the process through which Megatron's writers return their results; it is kept between saves. Started as our
    child so that it dies with this rank; restarted when it is gone. Returns why it cannot be had."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with contextlib.suppress(EOFError, OSError):  # it is gone
        if filesystem_async._results_queue is not None and filesystem_async._results_queue.qsize() >= 0:
            return None
    reason = ""
    for _ in range(2):
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        try:
            manager.start(die_with_parent, (os.getpid(),))
            filesystem_async._results_queue = manager.Queue()
            return None
        except (EOFError, OSError) as exc:  # it was killed while it started
            reason = f"{type(exc).__name__} {exc}".strip()
    return CheckpointError(f"the process that writes checkpoints ended while it started ({reason}); is memory short?")


def _read(folder: Path, state: dict[str, Any]) -> Any:
    """Fills the state. What data-parallel ranks have in common is read by one of them and handed to the others."""
    group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), group)
    return dist_checkpointing.load(state, str(folder), strategy)


def _content_metadata(folder: Path) -> dict[str, Any]:
    return dist_checkpointing.load_content_metadata(str(folder)) or {}


def _fill_weights(chunks: Sequence[Any], loaded: Mapping[str, Any]) -> None:
    """Copies loaded weights into the model chunks."""
    for n, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_chunk_name(n, len(chunks))], strict=True)


def _metadata() -> dict[str, Any]:
    """How Megatron shards the optimizer state: so that any layout can load it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _chunk_name(n: int, chunks: int) -> str:
    return "model" if chunks == 1 else f"model{n}"


def _weights_state(chunks: Sequence[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    return {_chunk_name(n, len(chunks)): c.sharded_state_dict(metadata=metadata) for n, c in enumerate(chunks)}


def _training_state(
    model: Sequence[Any], optimizer: Any, schedule: Any, metadata: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    weights = _weights_state([chunk.module for chunk in model], metadata)
    state: dict[str, Any] = dict(weights)
    optimizer_state.keep_sharded(optimizer)
    state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    state["schedule"] = schedule.state_dict()
    state["rng"] = parallel.share(_rng_state)  # rank 0's: the trainer itself draws nothing, and common state must agree
    return state


def _rng_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
