"""Weight sync into a real server: what arrives is what was sent, on every transport, and what is not is said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from live_server import LiveServer
from reference import Reference, random_weights
from tiny_model import VOCAB_SIZE

from torl_mega.config import Config, ServingConfig
from torl_mega.errors import WeightSyncError
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.probe import prompt_logprobs
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.control import Call, Deadline
from torl_mega.serving.sync.weights import ServerSink, make_transport, make_weight_sink

TRANSPORTS = ("broadcast", "handles", "disk")
PROBE = (48, 25, 220, 16, 10, 17, 28, 30)


def serving(config: Config, transport: str, folder: Path, **changes: object) -> ServingConfig:
    update = {"transport": transport, "disk_dir": str(folder / "weights")} | changes
    return config.serving.model_copy(update=update)


def gap(server: LiveServer, reference: Reference, weights: dict[str, torch.Tensor]) -> float:
    """Largest difference of prompt log-probs between the server and HF with these weights."""
    reference.load(weights)
    there = torch.from_numpy(asyncio.run(prompt_logprobs(server.url, PROBE)))[1:]
    return float((there - reference.logprobs(PROBE[:1], PROBE[1:])).abs().max())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_sync_leaves_the_weights_that_were_sent(
    live_server: LiveServer, tiny_config: Config, reference: Reference, tmp_path: Path, transport: str
) -> None:
    config = serving(tiny_config, transport, tmp_path, bucket_mb=1)
    sink = make_weight_sink(config, [live_server.url])
    for number in (11, 12):
        weights = random_weights(reference.original(), number)
        stats = sink.update(iter(weights.items()), version=number)
        assert live_server.version() == str(number)
        assert gap(live_server, reference, weights) < 1e-4
        assert stats["bytes"] == sum(w.nbytes for w in weights.values())
        assert stats["num_tensors"] == len(weights)
        assert stats["num_servers"] == 1
        assert stats["num_servers_down"] == 0
        assert 0 < stats["verify_s"] < stats["sync_s"]
    assert not list((tmp_path / "weights").glob("*")) if transport == "disk" else True


class Saboteur:
    """A transport that flips one bit of one tensor after it was hashed: what a bad wire or a bad loader would do."""

    def __init__(self, inner: object, victim: str, index: int) -> None:
        self._inner, self._victim, self._index = inner, victim, index
        self.in_session = inner.in_session  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def send(self, bucket: Bucket, deadline: Deadline) -> None:
        named = tuple((n, self._flipped(t) if n == self._victim else t) for n, t in bucket.named)
        self._inner.send(Bucket(named), deadline)  # type: ignore[attr-defined]

    def _flipped(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.view(-1).view(torch.uint8)[self._index] ^= 1
        return copy


@pytest.mark.parametrize(
    ("transport", "victim", "index"),
    [
        ("broadcast", "model.layers.1.self_attn.k_proj.weight", -1),
        ("broadcast", "model.layers.0.mlp.up_proj.weight", 0),
        ("broadcast", "model.layers.0.self_attn.q_proj.bias", 5),
        ("broadcast", "model.embed_tokens.weight", 4 * 64 * 300),
        ("handles", "model.norm.weight", 0),
        ("disk", "lm_head.weight", -1),
    ],
)
def test_one_wrong_bit_is_found_by_name(
    live_server: LiveServer, tiny_config: Config, reference: Reference, tmp_path: Path,
    transport: str, victim: str, index: int,
) -> None:  # fmt: skip
    config = serving(tiny_config, transport, tmp_path)
    weights = random_weights(reference.original(), 21)
    bad = ServerSink(
        config, [live_server.url], Saboteur(make_transport(config, torch.device("cpu"), {}), victim, index)
    )
    with pytest.raises(WeightSyncError, match=f"{live_server.url} rank 0: tensor {victim} .*checksum") as caught:
        bad.update(iter(weights.items()), version=22)
    assert "\n" not in str(caught.value)
    assert live_server.version() == "torn"
    make_weight_sink(config, [live_server.url]).update(iter(weights.items()), version=23)
    assert live_server.version() == "23"
    assert gap(live_server, reference, weights) < 1e-4


def test_tensors_that_are_missing_or_of_another_model_are_refused(
    live_server: LiveServer, tiny_config: Config, reference: Reference, tmp_path: Path
) -> None:
    weights = random_weights(reference.original(), 31)
    sink = make_weight_sink(serving(tiny_config, "broadcast", tmp_path), [live_server.url])
    partial = {n: w for n, w in weights.items() if "layers.1.mlp.gate_proj" not in n}
    with pytest.raises(
        WeightSyncError, match=r"no tensor was sent that fills its parameter model\.layers\.1\.mlp\.gate_up"
    ):
        sink.update(iter(partial.items()), version=32)
    with pytest.raises(WeightSyncError, match=r"has no use for tensor model\.layers\.9\.extra\.weight"):
        sink.update(iter([*weights.items(), ("model.layers.9.extra.weight", torch.ones(3))]), version=32)
    wrong = weights | {"model.norm.weight": torch.ones(65)}
    with pytest.raises(WeightSyncError, match="HTTP 400"):
        sink.update(iter(wrong.items()), version=32)
    with pytest.raises(WeightSyncError, match="no tensors"):
        sink.update(iter(()), version=32)
    assert live_server.version() == "torn"
    sink.update(iter(weights.items()), version=33)
    assert gap(live_server, reference, weights) < 1e-4


def test_a_failed_sync_still_drains_its_iterator(live_server: LiveServer, tiny_config: Config, tmp_path: Path) -> None:
    """The other ranks wait in the collectives behind every tensor."""
    seen = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(5):
            seen.append(number)
            yield f"alien.{number}", torch.ones(300_000)

    with pytest.raises(WeightSyncError):
        make_weight_sink(serving(tiny_config, "broadcast", tmp_path), [live_server.url]).update(tensors(), version=1)
    assert seen == list(range(5))


def test_a_session_left_open_by_a_dead_trainer_is_closed(
    live_server: LiveServer, tiny_config: Config, reference: Reference, tmp_path: Path
) -> None:
    Call(live_server.url, "/begin_weight_update", {}, Deadline(10)).result()
    weights = random_weights(reference.original(), 41)
    sink = make_weight_sink(serving(tiny_config, "broadcast", tmp_path), [live_server.url])
    sink.update(iter(weights.items()), version=41)
    assert gap(live_server, reference, weights) < 1e-4


def test_servers_that_are_not_there(tiny_config: Config, tmp_path: Path) -> None:
    """They may be starting again, so a sync waits for them, as long as it may."""
    sink = make_weight_sink(serving(tiny_config, "broadcast", tmp_path, sync_timeout_s=1.2), ["http://127.0.0.1:9"])
    with pytest.raises(WeightSyncError, match=r"no server answers: http://127\.0\.0\.1:9; .*sync_timeout_s = 1\.2 s"):
        sink.update(iter([("a", torch.ones(1))]), version=1)
    with pytest.raises(ValueError, match=r"serving\.disk_dir"):
        ServingConfig(transport="disk")
    with pytest.raises(WeightSyncError, match="no server to send weights to"):
        make_weight_sink(tiny_config.serving, [])


@contextlib.contextmanager
def frozen_scheduler(server: LiveServer) -> Iterator[None]:
    """The scheduler process of the server, stopped as a hang would; the HTTP process still answers."""
    tree = psutil.Process(server.sidecar.pid).children(recursive=True)
    (scheduler,) = [p for p in tree if p.name() == "sglang::scheduler"]
    os.kill(scheduler.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(scheduler.pid, signal.SIGCONT)


class FreezeAt:
    """Tensors that freeze the server's scheduler when the stream is half-way through."""

    def __init__(self, weights: dict[str, torch.Tensor], server: LiveServer, stack: contextlib.ExitStack) -> None:
        self._weights, self._server, self._stack = weights, server, stack

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(self._weights.items()):
            if number == len(self._weights) // 2:
                self._stack.enter_context(frozen_scheduler(self._server))
            yield item


@pytest.mark.parametrize("transport", ["broadcast", "handles"])
def test_a_server_that_hangs_ends_the_sync_in_time(
    live_server: LiveServer, tiny_config: Config, reference: Reference, tmp_path: Path, transport: str
) -> None:
    weights = random_weights(reference.original(), 51)
    sink = ServerSink(
        config := serving(tiny_config, transport, tmp_path, sync_timeout_s=4.0),
        [live_server.url],
        make_transport(config, torch.device("cpu"), {}),
    )
    sink.bucket_bytes = 50_000  # many buckets from a small model
    begun = time.monotonic()
    with contextlib.ExitStack() as stack, pytest.raises(WeightSyncError, match=r"serving\.sync_timeout_s = 4 s|silent"):
        sink.update(FreezeAt(weights, live_server, stack), version=52)
    assert time.monotonic() - begun < 4 + 15
    good = make_weight_sink(serving(tiny_config, transport, tmp_path), [live_server.url])
    good.update(iter(weights.items()), version=53)
    assert live_server.version() == "53"
    assert gap(live_server, reference, weights) < 1e-4
    sink.update(iter(weights.items()), version=54)
    assert live_server.version() == "54"


def test_old_prefixes_are_forgotten(
    live_server: LiveServer, tiny_config: Config, reference: Reference, tmp_path: Path
) -> None:
    """A prompt cached under the old weights must not colour the first token after a sync."""
    from torl_mega.types import GenerationRequest

    prompt = tuple(range(40, 140))

    async def sample(expected: int) -> tuple[int, float]:
        async with SGLangClient([live_server.url], tiny_config.serving, vocab_size=VOCAB_SIZE) as client:
            client.expect_version(expected)
            g = await client.generate(GenerationRequest(prompt, 1, 1.0, 1.0, (), 1, "p"))
            return g.token_ids[0], g.logprobs[0]

    sink = make_weight_sink(serving(tiny_config, "broadcast", tmp_path), [live_server.url])
    for number in (61, 62):
        weights = random_weights(reference.original(), number)
        sink.update(iter(weights.items()), version=number)
        reference.load(weights)
        for _ in range(2):
            token, logprob = asyncio.run(sample(number))
            assert abs(float(reference.logprobs(prompt, [token])[0]) - logprob) < 1e-4
