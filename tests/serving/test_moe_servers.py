"""Experts on their way to a real server of two tensor ranks: every one arrives where it belongs, and what does not is named."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from live_server import LiveServer, write_config
from tiny_model import make_tiny_moe

from torl_mega.config_file import load_config
from torl_mega.errors import WeightSyncError
from torl_mega.layout import describe_model, read_hf_config
from torl_mega.serving.probe import prompt_logprobs
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.weights import ServerSink, make_transport, make_weight_sink
from torl_mega.trainer.weights.hf_io import HfReader
from torl_mega.trainer.weights.hf_mapping import all_names

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parallel"))
from layout_cases import Layout  # noqa: E402
from torchrun import run_python  # noqa: E402

PROBE = (48, 25, 220, 16, 10, 17, 28, 30)
EXPERT = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_moe(tmp_path_factory.mktemp("tiny_moe"))
    write_config(folder, folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, start_server: Callable[..., LiveServer]) -> Iterator[LiveServer]:
    server = start_server(model / "tiny.yaml", "serving.tensor=2")
    asyncio.run(wait_ready(server.url, 280, process=server.sidecar, log_path=server.log))
    yield server
    server.sidecar.stop()


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, torch.Tensor]:
    shape = describe_model(read_hf_config(model))
    reader = HfReader(model, shape)
    return {name: reader.get(name) for name in all_names(shape)}


def logprobs(server: LiveServer) -> np.ndarray:
    return np.asarray(asyncio.run(prompt_logprobs(server.url, PROBE)))[1:]


def test_spread_and_cut_experts_arrive(server: LiveServer, model: Path, tmp_path: Path) -> None:
    layouts = [Layout(data=2, expert=2), Layout(tensor=2, sequence=True, expert_tensor=2)]
    results, cases = tmp_path / "results.jsonl", tmp_path / "cases.json"
    cases.write_text(json.dumps([asdict(layout) for layout in layouts]))
    run_python(HERE / "moe_sync_worker.py", results, model, server.url, cases, timeout_s=240.0)
    table = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["layout"] for row in table] == [layout.name for layout in layouts]
    assert all(row["gap"] <= 1e-4 for row in table), table
    assert all(row["num_tensors"] == 69 for row in table), table
    assert server.version() == str(len(layouts))
    named = "model.layers.0.mlp.experts.0.gate_proj.weight is (16, 64) after it was gathered, the model says (32, 64)"
    assert table[1]["unmerged"] == named


class Swapped:
    """A transport that exchanges two experts after they were hashed: a loader that counts them otherwise."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.in_session = inner.in_session  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def send(self, bucket: Bucket, deadline: object) -> None:
        self._inner.send(Bucket(tuple(swapped(dict(bucket.named)).items())), deadline)  # type: ignore[attr-defined]


def swapped(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts 2 and 5 of one layer in each other's place."""
    other = {EXPERT + "2.": EXPERT + "5.", EXPERT + "5.": EXPERT + "2."}
    found = {name: next((b + name[len(a) :] for a, b in other.items() if name.startswith(a)), name) for name in named}
    return {name: named[source] for name, source in found.items()}


def test_each_planted_fault_is_named(server: LiveServer, model: Path, weights: dict[str, torch.Tensor]) -> None:
    config = load_config(model / "tiny.yaml").serving
    sink = make_weight_sink(config, [server.url])
    lost = {name: w for name, w in weights.items() if name != EXPERT + "3.down_proj.weight"}
    with pytest.raises(
        WeightSyncError, match=r"no tensor was sent that fills its parameter model\.layers\.1\.mlp\.experts\.w2_weight"
    ):
        sink.update(iter(lost.items()), version=90)

    bad = ServerSink(config, [server.url], Swapped(make_transport(config, torch.device("cpu"), {})))
    with pytest.raises(WeightSyncError, match=r"tensor model\.layers\.1\.mlp\.experts\.[25]\..* has checksum"):
        bad.update(iter(weights.items()), version=92)
    assert server.version() == "torn"
    sink.update(iter(weights.items()), version=93)
    assert server.version() == "93"


def test_experts_swapped_before_they_are_hashed_show_in_the_log_probs(
    server: LiveServer, model: Path, weights: dict[str, torch.Tensor]
) -> None:
    sink = make_weight_sink(load_config(model / "tiny.yaml").serving, [server.url])
    sink.update(iter(weights.items()), version=94)
    right = logprobs(server)
    sink.update(iter(swapped(weights).items()), version=95)
    assert np.abs(logprobs(server) - right).max() > 0.01
