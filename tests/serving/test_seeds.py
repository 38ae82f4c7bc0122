"""On a CPU the sampling seed counts: alone, and in whatever company a request is batched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from live_server import LiveServer
from test_client import request
from tiny_model import VOCAB_SIZE

from torl_mega.config import Config
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.plugin.seeded_sampling import multinomial_with_seed, murmur_hash32
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.types import Generation


def answers(url: str, config: Config, seeds: list[int]) -> list[Generation]:
    """Those of requests with these seeds, all sent at once."""

    async def run() -> list[Generation]:
        async with SGLangClient([url], config.serving, vocab_size=VOCAB_SIZE) as client:
            client.expect_version(None)
            return await asyncio.gather(*(client.generate(request(seed=s, max_new_tokens=24)) for s in seeds))

    return asyncio.run(run())


def sample(url: str, config: Config, seeds: list[int]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers(url, config, seeds)]


@pytest.mark.skipif(os.environ.get("CUDA_VISIBLE_DEVICES", "") != "", reason="GPUs use SGLang's deterministic mode")
def test_tokens_follow_the_seed(live_server: LiveServer, tiny_config: Config) -> None:
    (alone,) = sample(live_server.url, tiny_config, [7])
    together = sample(live_server.url, tiny_config, [1, 2, 7, 3, 7])
    assert together[2] == together[4] == alone
    assert len({*together}) == 4


@pytest.mark.skipif(os.environ.get("CUDA_VISIBLE_DEVICES", "") != "", reason="GPUs use SGLang's deterministic mode")
def test_the_exact_generator_repeats_bit_for_bit(
    start_server: Callable[..., LiveServer], tiny_config_path: Path, tiny_config: Config
) -> None:
    server = start_server(tiny_config_path, "serving.deterministic=true")
    try:
        asyncio.run(wait_ready(server.url, 280, process=server.sidecar, log_path=server.log))
        seeds = list(range(12))
        first, second = answers(server.url, tiny_config, seeds), answers(server.url, tiny_config, seeds[::-1])
    finally:
        server.sidecar.stop()
    assert [(a.token_ids, a.logprobs) for a in first] == [(a.token_ids, a.logprobs) for a in second[::-1]]


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 for a multiple of four bytes, from its reference (Appleby, smhasher)."""
    mask, h = 0xFFFFFFFF, 0
    for at in range(0, len(data), 4):
        k = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        h = (h << 13 | h >> 19) & mask
        h = h * 5 + 0xE6546B64 & mask
    h ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> shift) * factor & mask
    return h


def test_the_hash_is_murmur3() -> None:
    seeds, positions, columns = [0, 7, 2**31 - 1, 2**40 + 5], [0, 1, 4095, 77], [0, 5, 151935]
    got = murmur_hash32(np.array(seeds), np.array(positions), np.array(columns))
    expected = [
        [murmur3(s.to_bytes(8, "little") + p.to_bytes(4, "little") + c.to_bytes(4, "little")) for c in columns]
        for s, p in zip(seeds, positions, strict=True)
    ]
    assert got.tolist() == expected


def test_a_token_is_the_argmax_of_its_logprob_and_gumbel_noise() -> None:
    """Against the formula in torch's float64, with a category that cannot be drawn and one that is certain."""
    logits = torch.randn(40, 320, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 5], logits[7] = -torch.inf, -torch.inf
    logits[7, 9] = 0.0
    seeds, positions = torch.arange(40).to(torch.uint64), torch.arange(40) % 7
    uniform = torch.from_numpy(
        murmur_hash32(seeds.to(torch.int64).numpy(), positions.numpy(), np.arange(320)).astype(np.float64) / (2**32 - 1)
    )
    expected = (logits.log_softmax(-1).double() - (-uniform.log()).log()).argmax(1)
    got = multinomial_with_seed(logits.log_softmax(-1), seeds, positions)
    assert got.shape == (40, 1)
    assert got[:, 0].tolist() == expected.tolist()
    assert int(got[7]) == 9


def test_draws_follow_the_distribution() -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = 40_000
    drawn = multinomial_with_seed(
        weights.log().expand(rows, 4), torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    )
    shares = torch.bincount(drawn[:, 0], minlength=4) / rows
    assert float((shares - weights).abs().max()) < 0.01
