"""The trainer's process groups, and `share`, which gives every rank what rank 0 has.

Contract: `init_distributed` reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; absent =
one rank) and builds Megatron's groups: gloo on CPU, NCCL on GPU, with `trainer.collective_timeout_s`. `share` travels on
a gloo group of its own with `trainer.share_timeout_s`, because the other ranks wait in it while rank 0 samples; an
exception on rank 0 is raised on every rank, so nobody hangs.
Limits: values are pickled (protocol 5) and sent in pieces; a rollout of 2,048 x 2,000 tokens is 65 MB and takes half a
second of CPU, less than turning its tuples into arrays and back.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore as _HashStore  # not re-exported for type checkers

from torl_mega.config import ParallelConfig, TrainerConfig
from torl_mega.errors import ConfigError, TorlError
from torl_mega.trainer.precision import kernel_environment

T = TypeVar("T")

_CHUNK_BYTES = 1 << 28
_share_group: dist.ProcessGroup | None = None


def init_distributed(parallel: ParallelConfig, trainer: TrainerConfig, *, share_cores: bool = False) -> None:
    """Join the process group and build Megatron's parallel groups. `share_cores`: on a CPU, leave half of the cores to
    servers that sample at the same time. Raises ConfigError when the sizes do not fit."""
    global _share_group
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % parallel.model_size or (
        parallel.data != "auto" and parallel.data * parallel.model_size != world_size
    ):
        raise ConfigError(
            f"{world_size} trainer ranks do not fit tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} x data {parallel.data}; start a multiple of {parallel.model_size}"
        )
    os.environ.update(kernel_environment(trainer))
    timeout = datetime.timedelta(seconds=trainer.collective_timeout_s)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest")  # fp32 means fp32; NVIDIA's image asks for TF32
        if trainer.deterministic:
            torch.use_deterministic_algorithms(True)
            # a check of programs, and slow
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_threads_per_rank(world_size, share_cores))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=_HashStore(), rank=0, world_size=1)
    group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=trainer.share_timeout_s))
    _share_group = group
    _build_groups(parallel, trainer)


def _threads_per_rank(world_size: int, share_cores: bool) -> int:
    """Cores of this machine over the ranks on it. Results repeat bit for bit only at the same number of threads."""
    cores = len(os.sched_getaffinity(0)) // (2 if share_cores else 1)
    if world_size == 1:
        return max(1, min(2, cores))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def _build_groups(parallel: ParallelConfig, trainer: TrainerConfig) -> None:
    """Megatron's groups on the running process group."""
    from torl_mega.trainer.cpu import backend as cpu_backend

    on_cpu = cpu_backend.install()
    from megatron.core import parallel_state, tensor_parallel

    if on_cpu:
        from torl_mega.trainer.cpu import adam as cpu_adam

        cpu_adam.install()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=max(1, round(trainer.collective_timeout_s / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)  # Megatron wants a seed; dropout is 0, so none is drawn


def destroy() -> None:
    """Leave the process group; safe to call twice."""
    global _share_group
    _share_group = None
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0() -> bool:
    return rank() == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> str:
    """Where this rank's tensors are: `cpu` or `cuda:N`."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def share(make: Callable[[], T]) -> T:
    """Rank 0's value on every rank. `make` is called on rank 0 alone; what it raises is raised on every rank.

    Rank 0 gets its own object back, the others an equal one.
    """
    if world_size() == 1:
        return make()
    if not is_rank0():
        return _unwrap(_receive())
    try:
        result = make()
        payload = pickle.dumps((True, result), protocol=5)
    except BaseException as exc:
        _send(pickle.dumps((False, _portable(exc))))
        raise
    _send(payload)
    return result


def sum_over_ranks(parts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Collective: the sum of every rank's tensor on the CPU; exact where each number is one rank's and 0 on the others."""
    if world_size() == 1:
        return parts
    on_device = parts.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def gather(value: T) -> list[T]:
    """Collective: every rank's value on rank 0, by rank; empty elsewhere."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size() if is_rank0() else []
    dist.gather_object(value, found or None, dst=0, group=_share_group)
    return found


def raise_together(error: BaseException | None) -> None:
    """Collective: raise on every rank when any rank has an error (the lowest such rank's)."""
    if world_size() == 1:
        if error is not None:
            raise error
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, None if error is None else _portable(error), group=_share_group)
    first = next((e for e in found if e is not None), None)
    if first is not None:
        raise first from error


def _unwrap(message: tuple[bool, Any]) -> Any:
    ok, value = message
    if not ok:
        raise value
    return value


def _portable(exc: BaseException) -> BaseException:
    """The exception itself when it survives pickling, else one of the same text."""
    try:
        pickle.loads(pickle.dumps(exc))
    except Exception:
        kind = TorlError if isinstance(exc, TorlError) else RuntimeError
        return kind(f"{type(exc).__name__}: {exc}")
    return exc


def _send(payload: bytes) -> None:
    dist.broadcast(torch.tensor([len(payload)], dtype=torch.int64), src=0, group=_share_group)
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    for piece in data.split(_CHUNK_BYTES):
        dist.broadcast(piece, src=0, group=_share_group)


def _receive() -> Any:
    size = torch.empty(1, dtype=torch.int64)
    dist.broadcast(size, src=0, group=_share_group)
    data = torch.empty(int(size), dtype=torch.uint8)
    for piece in data.split(_CHUNK_BYTES):
        dist.broadcast(piece, src=0, group=_share_group)
    return pickle.loads(data.numpy().data)
