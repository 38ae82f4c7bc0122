"""Step 0's comparison of a real server with a trainer, whose part Hugging Face plays."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from live_server import LiveServer
from reference import Reference, random_weights

from torl_mega.config import Config
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ServerError
from torl_mega.serving.probe import ask, check_engines
from torl_mega.serving.sync.weights import make_weight_sink
from torl_mega.serving.turns import Resident
from torl_mega.serving.whose_weights import whose_weights
from torl_mega.types import Sample


@dataclass(frozen=True)
class Rank0:
    tokenizer: Any
    server_urls: tuple[str, ...]
    run: Any = asyncio.run


class ReferenceTrainer:
    """Scores as the trainer does: nothing predicts the first token."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def score(self, sample: Sample, *, temperature: float) -> np.ndarray:
        assert temperature == 1.0  # the servers' prompt log-probs are
        ids = sample.token_ids.tolist()
        return np.array([0.0, *self.reference.logprobs(ids[:1], ids[1:]).tolist()], np.float32)


class Shifted:
    """A tokenizer of another model: every id is one higher."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return [token + 1 for token in self.tokenizer.encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode([token - 1 for token in token_ids])


def test_trainer_and_server_that_disagree_are_found(
    live_server: LiveServer, tiny_config: Config, reference: Reference
) -> None:
    weights = random_weights(reference.original(), 101)
    make_weight_sink(tiny_config.serving, [live_server.url]).update(iter(weights.items()), version=101)
    reference.load(weights)
    trainer: Any = ReferenceTrainer(reference)
    tokenizer = Tokenizer(tiny_config.model.path)

    def check(tokenizer: Any, *urls: str) -> None:
        check_engines(trainer, Rank0(tokenizer, urls), tiny_config, lambda make: make(), Resident())

    check(tokenizer, live_server.url)
    with pytest.raises(ServerError, match=rf"{live_server.url} and the trainer encode .* differently from token 0 on"):
        check(Shifted(tokenizer), live_server.url)
    swapped = dict(weights)  # gate for up: the shapes fit, so only the numbers show it
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    swapped[gate], swapped[up] = weights[up], weights[gate]
    reference.load(swapped)
    with pytest.raises(ServerError, match=rf"{live_server.url} and the trainer disagree on the probe text: token \d+"):
        check(tokenizer, live_server.url)
    check(Shifted(tokenizer))  # a replay has no servers: nothing is asked


def test_a_server_says_whose_weights_it_holds(
    live_server: LiveServer, tiny_config: Config, reference: Reference
) -> None:
    """As loaded, or as the trainer of a run left them: those are not what `torl eval` is asked to score."""
    weights, told = reference.original(), lambda: ask(live_server.url, "/model_info")
    sink, path = make_weight_sink(tiny_config.serving, [live_server.url]), asyncio.run(told())["model_path"]
    sink.update(iter(weights.items()), version=0)
    (line,) = asyncio.run(whose_weights([live_server.url], path))
    assert line == f"{live_server.url} holds the weights of {path}, version 0"
    sink.update(iter(weights.items()), version=3)
    with pytest.raises(ServerError, match="holds version 3 of a training run's weights"):
        asyncio.run(whose_weights([live_server.url], path))
