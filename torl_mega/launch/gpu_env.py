"""What the environment of every GPU process of a run says, ranks and servers alike.

NCCL's settings must agree between the two ends of the weight group, and SGLang chooses them for its own processes. Kernels
that are compiled when they are first used go to a folder that outlives the container, or every start compiles them anew.

Contract: pure; `base` is the environment that both kinds of process inherit, and what it says already wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def gpu_environment(runs_dir: str, base: Mapping[str, str]) -> dict[str, str]:
    """The variables to add. Kernels are kept in TORL_CACHE, by default below `runs_dir`, which all nodes share."""
    cache = Path(base.get("TORL_CACHE") or Path(runs_dir).resolve() / ".cache")
    settings = {**_NCCL, **_CACHES}
    return {name: value.format(cache=cache) for name, value in settings.items() if name not in base}


_NCCL = {
    # what SGLang 0.5.23 sets in its processes where nothing is said (entrypoints/engine.py:1898-1915)
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    # Megatron counts on it for tensor parallelism (tensor_parallel/layers.py:621 of 0.19.2); SGLang sets its own
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
_CACHES = {
    # SGLang puts flashinfer, DeepGEMM and tilelang below it (srt/environ.py:1373, 2309 of 0.5.23)
    "SGLANG_CACHE_DIR": "{cache}/sglang",
    "SGLANG_JIT_CACHE_DIR": "{cache}/sglang/jit",  # which has a default of its own (kernels/jit/utils/compile/cache.py:318)
    "TVM_FFI_CACHE_DIR": "{cache}/tvm-ffi",
    "TRITON_CACHE_DIR": "{cache}/triton",  # of ranks too: by themselves below the home folder, and inductor below /tmp
    "TORCHINDUCTOR_CACHE_DIR": "{cache}/inductor",
    "CUDA_CACHE_PATH": "{cache}/cuda",
}
