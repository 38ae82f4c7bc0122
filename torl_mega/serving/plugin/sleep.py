"""Server side of the turns that servers and trainer take on their GPUs: letting go of memory, and taking it back.

SGLang's own calls, /release_memory_occupation and /resume_memory_occupation with tags, end the scheduler when they are asked
twice for the same: torch_memory_saver refuses to pause what is paused, and the set of released tags has nothing to remove. Here
both do what is left to do, so that rank 0 may simply say what every server is to hold, whichever of them has just come back.

Without GPUs, where there is no torch_memory_saver, they empty the storages themselves: weights and KV cache really are gone.
As after torch_memory_saver, what comes back holds no weights: all bits of them are set, so that an update that misses a tensor
shows as NaN.

Runs in SGLang's scheduler processes, as AROUND hooks on `SchedulerWeightUpdaterManager`
(srt/managers/scheduler_components/weight_updater.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch

_ALL = ("weights", "kv_cache", "cuda_graph")
_sizes: dict[int, int] = {}  # bytes of each empty storage, by its identity


def release(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    """The hook: lets go of those of the asked tags that are held."""
    tags = [tag for tag in request.tags or _ALL if tag not in updater.offload_tags]
    if not tags:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

        return ReleaseMemoryOccupationReqOutput()
    answer = original(updater, msgspec.structs.replace(request, tags=tags))
    if not torch.cuda.is_available():
        for storage in _storages(updater, tags):
            _sizes[storage._cdata] = storage.nbytes()
            storage.resize_(0)
        ctypes.CDLL(None).malloc_trim(0)  # else the allocator keeps it
    return answer


def resume(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    """The hook: takes back those of the asked tags that are not held."""
    tags = [tag for tag in request.tags or _ALL if tag in updater.offload_tags]
    if not tags:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

        return ResumeMemoryOccupationReqOutput()
    if not torch.cuda.is_available():
        for storage in _storages(updater, tags):
            storage.resize_(_sizes.pop(storage._cdata))
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)
    return original(updater, msgspec.structs.replace(request, tags=tags))


def _storages(updater: Any, tags: list[str]) -> Iterator[torch.UntypedStorage]:
    """Each storage of weights and buffers, and of the KV cache, once."""
    runner, tensors = updater.tp_worker.model_runner, []
    if "weights" in tags:
        tensors += [*runner.model.parameters(), *runner.model.buffers()]
    if "kv_cache" in tags:
        tensors += [*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer]
    yield from {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}.values()
