"""Ranks forked from this process: torchrun's environment without importing torch and Megatron once per rank.

The process that forks may import anything but must not have computed gradients: torch refuses autograd in its children.
Every start has process groups of its own; a process that makes and destroys them over and over keeps all of gloo's threads.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import wait

from torchrun import free_port


def run_ranks(size: int, target: Callable[[], None], timeout_s: float) -> None:
    """`target()` on `size` ranks. Raises RuntimeError when one fails and TimeoutError when time is up; none is left."""
    context = multiprocessing.get_context("fork")
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        context.Process(target=_rank, args=({**shared, "RANK": rank, "LOCAL_RANK": rank}, target))
        for rank in range(size)
    ]
    deadline = time.monotonic() + timeout_s
    for rank in ranks:
        rank.start()
    running = list(ranks)
    try:
        while running:
            ended = wait([rank.sentinel for rank in running], max(deadline - time.monotonic(), 0.0))
            if not ended:
                raise TimeoutError(f"{len(running)} of {size} ranks still run after {timeout_s:g} s")
            for rank in [rank for rank in running if rank.sentinel in ended]:
                rank.join()
                running.remove(rank)
                if rank.exitcode:
                    raise RuntimeError(f"rank {ranks.index(rank)} of {size} ended with exit code {rank.exitcode}")
    finally:
        for rank in running:
            rank.kill()
            rank.join()


def _rank(environment: dict[str, object], target: Callable[[], None]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    target()
