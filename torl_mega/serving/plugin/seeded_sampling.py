"""Makes `sampling_seed` count on a CPU, where SGLang 0.5.23 drops it: seeds need its deterministic mode, and that a GPU.

The pure torch sampler itself takes seeds (srt/layers/sampler.py `multinomial_with_seed`: Gumbel noise hashed from seed,
position and token); only its hash is a compiled kernel. So the batch is given its seeds, and the drawing is done in numpy.
A token then depends on its request's seed alone, up to ties that the last bits of a logit decide: those depend on which
requests share a batch. `serving.deterministic` takes that away too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

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


def multinomial_with_seed(logprobs: Any, seed: Any, positions: Any) -> Any:
    """[n, m], [n], [n] -> [n, 1], one category a row, drawn by the noise of its seed and position. REPLACE hook.

    SGLang's formula, in numpy on one core three times as fast; float64, as its own comment asks.
    """
    import torch

    noise = murmur_hash32(seed.to(torch.int64).numpy(), positions.numpy(), np.arange(logprobs.shape[1]))
    noise = noise / np.float64(MASK)
    with np.errstate(divide="ignore"):  # the hash may be 0
        np.log(noise, out=noise)
    np.clip(noise, np.finfo(np.float64).min, -(2.0**-32), out=noise)
    np.log(np.negative(noise, out=noise), out=noise)
    scores = np.subtract(logprobs.float().numpy(), noise, out=noise)
    return torch.from_numpy(scores.argmax(1)[:, None])


def murmur_hash32(seed: np.ndarray, positions: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """MurmurHash3 x86_32 of the 16 bytes (seed u64, position u32, column u32): [n], [n], [m] -> [n, m] uint32.

    The same numbers as SGLang's GPU kernel (kernels/ops/sampling/murmur_hash.py). numpy's uint32 wraps as they must, and
    what does not depend on the column is computed once a row.
    """
    rows = np.zeros(len(seed), np.uint32)
    for block in (seed, seed >> 32, positions):
        rows = _mixed(rows, _key(block))
    hashed = _mixed(rows[:, None], _key(columns))
    hashed ^= np.uint32(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashed ^= hashed >> np.uint32(shift)
        hashed *= np.uint32(factor)
    return hashed


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
