"""A 64-bit checksum of a tensor's bytes, equal on trainer and server wherever the bytes are equal.

On a CPU it is XXH3 (27 GB/s on one core). On a GPU, from which the bytes would have to be copied for that, it is a sum of
32-bit words times odd 64-bit multipliers drawn once from a fixed seed, in two levels, modulo 2**64: one wrong word
always changes it, and several cancel with probability about 2**-33. Both sides must therefore hash on the same kind of
device: `checksum(tensor, kind)` moves the tensor there first. Guards against faults, not against malice.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

ROW = 16384  # words per first-level sum
MAX_THREADS = 4
ROWS_AT_ONCE = 256  # bounds the temporary to 32 MB


def checksum(tensor: torch.Tensor, kind: str) -> str:
    """Sixteen hex digits. `kind` is `cpu` or `cuda`. Shape and dtype do not count, bytes in row-major order do."""
    tensor = tensor.detach()
    if tensor.device.type != kind:
        tensor = tensor.to(kind)
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if kind == "cpu":
        import xxhash  # not there in an environment that serves on GPUs only

        # not through numpy: a storage that it has seen can never be resized, as sleep.py and trainer/parking.py do
        return xxhash.xxh3_64_hexdigest((ctypes.c_uint8 * flat.numel()).from_address(flat.data_ptr()))
    return f"{word_sum(flat):016x}"


def checksums(tensors: Sequence[torch.Tensor], kind: str) -> list[str]:
    """The checksum of each. On a CPU several threads hash (xxhash releases the GIL), for moments when nothing else runs."""
    if kind != "cpu":
        return [checksum(tensor, kind) for tensor in tensors]
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(lambda tensor: checksum(tensor, kind), tensors))


def word_sum(flat: torch.Tensor) -> int:
    """The GPU's checksum of [N] uint8, on whatever device they are."""
    length = flat.numel()
    padding = -length % 4
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    # a view as int32 needs an aligned start; a slice of a bucket may not have one
    words = flat.view(torch.int32) if flat.storage_offset() % 4 == 0 else flat.clone().view(torch.int32)
    first = _multipliers(ROW, str(flat.device))
    whole = words.numel() // ROW * ROW
    blocks = words[:whole].view(-1, ROW).split(ROWS_AT_ONCE)
    sums = [(block.to(torch.int64) * first).sum(1) for block in blocks]
    rest = words[whole:].to(torch.int64)
    sums.append((rest * first[: rest.numel()]).sum(0, keepdim=True))
    rows = torch.cat(sums)
    second = _multipliers(rows.numel(), str(flat.device))
    total = int((rows * second).sum()) + length * 0x9E3779B97F4A7C15
    return total % 2**64


@functools.lru_cache(maxsize=64)
def _multipliers(count: int, device: str) -> torch.Tensor:
    """[count] odd int64, the same on every machine."""
    generator = torch.Generator().manual_seed(20230338)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)
