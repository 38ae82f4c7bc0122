"""Redirects what Megatron-Core asks of CUDA to the CPU, so that it runs unmodified on a machine without a GPU, over gloo.

Megatron-Core has no device abstraction: it asks `torch.cuda.current_device()` where to put tensors, writes
`device="cuda"` literals, and compares `tensor.type()` with "torch.cuda.*" strings. `install` points exactly those at the
CPU: attribute patches of `torch.cuda` and a few functions of Megatron (for experts: experts.py), and one TorchFunctionMode for
the literals, which sit in ten functions and move between versions. Checked with megatron-core 0.16.1 and 0.19.2.

Contract: a no-op where CUDA exists, so the GPU path is never touched. Call it once per process (and once per further
thread that runs Megatron: the mode is per thread) before the first import of megatron.core.pipeline_parallel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_local = threading.local()


def _is_cuda(device: object) -> bool:
    return device.startswith("cuda") if isinstance(device, str) else getattr(device, "type", None) == "cuda"


class _CudaIsCpu(TorchFunctionMode):
    """device="cuda" means the CPU; CPU tensors answer .type() and .cuda() as CUDA tensors would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
                if kwargs.get("pin_memory"):
                    kwargs["pin_memory"] = False
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args)


class _NullStream:
    """Stands for a CUDA stream and for an event on one: everything is done when it was called."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self, event: object = None) -> object:
        return event or _NullStream()

    def synchronize(self) -> None: ...


def _stub_triton_kernels() -> None:
    """0.19 imports one MoE module of Triton kernels unconditionally (schedules.py -> moe/paged_stash.py)."""
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is None and name not in sys.modules:
        stub: Any = types.ModuleType(name)
        stub.GLOBAL_BLOCK_SIZE, stub.paged_stash_copy_kernel, stub.paged_stash_pop_kernel = 1024, None, None
        sys.modules[name] = stub


def install() -> bool:
    """Turn the redirection on for this process and this thread; True when it is on, False where CUDA exists."""
    if torch.cuda.is_available():
        return False
    if getattr(_local, "mode", None) is None:
        _patch()
        _local.mode = _CudaIsCpu()
        _local.mode.__enter__()
    return True


def _patch() -> None:
    """Points the functions of torch.cuda that Megatron calls by name at the CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda device=None: None
    # megatron-core 0.19: param_and_grad_buffer; the token dispatcher of experts
    cuda.current_stream = lambda device=None: _NullStream()
    cuda.Stream, cuda.stream = _NullStream, lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    _stub_triton_kernels()
    import megatron.core.tensor_parallel.random as megatron_random

    redirected: Any = megatron_random
    redirected._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    from torl_mega.trainer.cpu import experts

    experts.install()
