"""Makes `sampling_seed` count on a CPU, where SGLang 0.5.23 drops it: seeds need its deterministic mode, and that a GPU.

The pure torch sampler itself takes seeds (srt/layers/sampler.py `multinomial_with_seed`: Gumbel noise hashed from seed,
position and token); only its hash is a compiled kernel. So the batch is given its seeds, and the hash is written in torch.
A token then depends on its request's seed alone, up to ties that the last bits of a logit decide; those bits depend on
which requests share a batch, unless `serving.deterministic` runs requests one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DEFAULT_SEED = 42  # SGLang's own for requests without one
MASK = 0xFFFFFFFF


def from_schedule_batch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on `SamplingBatchInfo.from_schedule_batch(batch, vocab_size)`: adds the requests' seeds to the batch."""
    import torch

    info = original(*args, **kwargs)
    batch = next(a for a in (*args, *kwargs.values()) if hasattr(a, "reqs"))
    if info.sampling_seed is None:
        seeds = [r.sampling_params.sampling_seed for r in batch.reqs]
        seeds = [DEFAULT_SEED if seed is None else seed for seed in seeds]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
    return info


def murmur_hash32(seed: Any, positions: Any, col_indices: Any) -> Any:
    """MurmurHash3 x86_32 of the 16 bytes (seed u64, position u32, column u32): [n], [n], [m] -> [n, m] int64.

    The same numbers as SGLang's GPU kernel (kernels/ops/sampling/murmur_hash.py). REPLACE hook.
    """
    import torch

    wide = seed.to(torch.int64)[:, None]
    hashed = torch.zeros((len(seed), len(col_indices)), dtype=torch.int64)
    blocks = (
        wide & MASK,
        (wide >> 32) & MASK,
        positions.to(torch.int64)[:, None],
        col_indices.to(torch.int64)[None, :],
    )
    for block in blocks:
        key = (block & MASK) * 0xCC9E2D51 & MASK  # int64 wraps, its low 32 bits are right all the same
        hashed = hashed ^ (_rotated(key, 15) * 0x1B873593 & MASK)
        hashed = (_rotated(hashed, 13) * 5 + 0xE6546B64) & MASK
    hashed = hashed ^ 16
    hashed = (hashed ^ (hashed >> 16)) * 0x85EBCA6B & MASK
    hashed = (hashed ^ (hashed >> 13)) * 0xC2B2AE35 & MASK
    return hashed ^ (hashed >> 16)


def _rotated(x: Any, bits: int) -> Any:
    return ((x << bits) | (x >> (32 - bits))) & MASK
