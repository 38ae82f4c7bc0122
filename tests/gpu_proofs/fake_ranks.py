"""Rank r of n in one process: Megatron's groups and a rank's model on torch's fake process group, no other rank runs.

Collectives on the fake group do nothing, so only what does not depend on their results means anything: which modules a
rank builds, their names, shapes and bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from torl_mega.layout import ModelShape
from torl_mega.trainer import parallel


@contextmanager
def rank_of(config: Any, rank: int, world_size: int) -> Iterator[None]:
    """The layout of `config`, a torl_mega Config, as rank `rank` of `world_size` sees it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # torch puts one of its own around it with every group
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    sys.excepthook = hook
    new_group, gather = dist.new_group, dist.all_gather_object

    def fake_group(*args: Any, backend: Any = None, pg_options: Any = None, **kwargs: Any) -> Any:
        del backend, pg_options
        return new_group(*args, **kwargs)

    def all_alike(found: list[Any], mine: Any, group: Any = None) -> None:
        """Every other rank says what this one says."""
        found[:] = [mine] * len(found)

    dist.new_group, dist.all_gather_object = fake_group, all_alike
    try:
        parallel._build_groups(config.parallel, config.trainer)
        dist.new_group = new_group
        yield
    finally:
        dist.new_group, dist.all_gather_object = new_group, gather
        parallel.destroy()


def build(config: Any, shape: ModelShape, kind: Any) -> tuple[list[Any], Any]:
    """This rank's model chunks as the trainer builds them, and their TransformerConfig."""
    from torl_mega.trainer.model import build_chunks, transformer_config

    dtype = getattr(torch, config.model.dtype)
    built = transformer_config(shape, config.parallel, config.trainer, dtype, kind)
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: kind == "te"  # TE's layers insist on it
    try:
        return build_chunks(shape, built, config.parallel, kind), built
    finally:
        torch.cuda.is_available = available
