"""Which experts a pass of the trainer took, token by token, for `algo.router_replay = old`.

    old-log-prob pass ─► each rank: per micro-batch and layer, the experts of its tokens ─► sum over ranks ─► Sample.routes

Contract: collective; every rank gets the routes of all tokens in all layers, as it has all samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from torl_mega.layout import ModelShape
from torl_mega.trainer.parallel import sum_over_ranks
from torl_mega.trainer.router import part_of
from torl_mega.types import Sample

SLICE = 1 << 16  # tokens that are summed at once: 100 MB of a device for 48 layers of 8
Chosen = tuple[np.ndarray, dict[int, torch.Tensor]]
"""Of one micro-batch in one model chunk: the place of each token among those of all samples, -1 on padding, and by layer (from 0)
the experts [t of this tensor rank, k] they went to."""


def with_routes(
    samples: Sequence[Sample], chosen: Sequence[Chosen], shape: ModelShape, device: torch.device
) -> list[Sample]:
    """The samples with the experts that the routers of all ranks took for their tokens."""
    assert shape.experts is not None
    bounds = np.cumsum([0, *(len(s.token_ids) for s in samples)]).tolist()
    table = torch.zeros(bounds[-1], shape.num_layers, shape.experts.top_k, dtype=torch.int16)
    for place, layers in chosen:
        mine = part_of(torch.from_numpy(place))
        real = mine >= 0
        for layer, experts in layers.items():
            table[mine[real], layer] = experts.cpu()[real]
    for part in table.split(SLICE):  # 16-bit integers are none of NCCL's and gloo's
        part.copy_(sum_over_ranks(part.to(torch.int32), device))
    routes = table.numpy()
    return [dataclasses.replace(s, routes=routes[a:b]) for s, (a, b) in zip(samples, pairwise(bounds), strict=True)]
