"""How many broadcasts a sync takes."""

from __future__ import annotations

import torch

from torl_mega.serving.plugin.weight_receive import SMALL, trips
from torl_mega.serving.sync.buckets import make_buckets


def test_small_tensors_travel_together() -> None:
    """Qwen2.5-7B in buckets of 512 MB: 141 norms and biases of 339 tensors, each once and in the order of the bucket."""
    h, f, kv, vocab, layers = 3584, 18944, 512, 152064, 28
    layer = [(h, h), (h,), (kv, h), (kv,), (kv, h), (kv,), (h, h), (f, h), (f, h), (h, f), (h,), (h,)]
    shapes = [(vocab, h), *layer * layers, (h,), (vocab, h)]
    named = [(str(n), torch.empty(shape, dtype=torch.bfloat16, device="meta")) for n, shape in enumerate(shapes)]
    sizes = [[tensor.nbytes for _, tensor in bucket.named] for bucket in make_buckets(named, 512 * 2**20)]
    assert sum(map(len, sizes)) == 339
    found = [trips(bucket) for bucket in sizes]
    assert sum(map(len, found)) < 339 - 141 + 31
    for bucket, made in zip(sizes, found, strict=True):
        assert sorted(n for trip in made for n in trip) == list(range(len(bucket)))
        for trip in made:
            assert len(trip) == 1 or (trip == sorted(trip) and all(bucket[n] < SMALL for n in trip))
    assert trips([]) == []
    assert trips([1, SMALL, 2]) == [[1], [0, 2]]
