"""On a CPU, SGLang 0.5.23 drops `sampling_seed` unless its deterministic mode is on, and that mode needs GPU attention.

The pure torch sampler itself takes seeds (srt/layers/sampler.py `multinomial_with_seed`: Gumbel noise hashed from seed,
position and token); only its hash is a compiled kernel. So the batch is given its seeds and the hash is written in numpy.
A token then depends on its request's seed alone, up to ties that the last bits of a logit decide: those depend on which
requests share a batch. `serving.deterministic` takes that away too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

DEFAULT_SEED = 42  # SGLang's own for requests without one


def from_schedule_batch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on `SamplingBatchInfo.from_schedule_batch(batch, vocab_size)`."""
    import torch

    info = original(*args, **kwargs)
    batch = next(a for a in (*args, *kwargs.values()) if hasattr(a, "reqs"))
    if info.sampling_seed is None:
        seeds = [r.sampling_params.sampling_seed for r in batch.reqs]
        seeds = [DEFAULT_SEED if seed is None else seed for seed in seeds]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
    return info


def murmur_hash32(seed: Any, positions: Any, col_indices: Any) -> Any:
    """MurmurHash3 x86_32 of the 16 bytes (seed u64, position u32, column u32): [n], [n], [m] -> [n, m] uint32.

    The same numbers as SGLang's GPU kernel (kernels/ops/sampling/murmur_hash.py). REPLACE hook. In numpy, whose uint32
    wraps; what does not depend on the column is computed once a row.
    """
    import torch

    wide = seed.to(torch.int64).numpy()
    rows = np.zeros(len(wide), np.uint32)
    for block in (wide, wide >> 32, positions.numpy()):
        rows = _mixed(rows, _key(block))
    hashed = _mixed(rows[:, None], _key(col_indices.numpy()))
    hashed ^= np.uint32(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashed ^= hashed >> np.uint32(shift)
        hashed *= np.uint32(factor)
    return torch.from_numpy(hashed)


def _key(block: np.ndarray) -> np.ndarray:
    """Four bytes of input, scrambled."""
    return _rotated(block.astype(np.uint32) * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _mixed(hashed: np.ndarray, key: np.ndarray) -> np.ndarray:
    mixed = _rotated(hashed ^ key, 13)
    mixed *= np.uint32(5)
    mixed += np.uint32(0xE6546B64)
    return mixed


def _rotated(x: np.ndarray, bits: int) -> np.ndarray:
    rotated = x << np.uint32(bits)
    rotated |= x >> np.uint32(32 - bits)
    return rotated
