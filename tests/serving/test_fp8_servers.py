"""Block-wise FP8 into a real server, which on a CPU holds and hashes such weights but has no kernels to compute with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from live_server import LiveServer, write_config
from safetensors.torch import load_file
from tiny_model import make_tiny_model, make_tiny_moe

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import WeightSyncError
from torl_mega.serving.fp8 import Fp8Sink, quantize_stream
from torl_mega.serving.sglang_server import launch_command, wait_ready
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.control import Deadline
from torl_mega.serving.sync.weights import ServerSink, make_transport, make_weight_sink


@pytest.fixture(scope="module", params=["dense", pytest.param("experts", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole blocks of q, k, v (256, 128, 128 rows) and gate, up (384, or 128 of
    each expert)."""
    folder = tmp_path_factory.mktemp("fp8_model")
    if kind == "experts":
        return make_tiny_moe(folder, hidden=256, ffn=128, head_dim=64)
    return make_tiny_model(folder, hidden_size=256, intermediate_size=384)


@pytest.fixture(scope="module")
def config(model: Path) -> Config:
    return load_config(write_config(model, model), ["model.dtype=bfloat16", "serving.weight_dtype=fp8_block"])


@pytest.fixture(scope="module")
def fp8_server(config: Config, model: Path, start_server: Callable[..., LiveServer]) -> Iterator[LiveServer]:
    command = launch_command(config, host="127.0.0.1", port=1, on_gpu=True)
    at = command.index("--json-model-override-args")
    extra = [*command[at : at + 4], "--skip-server-warmup"]  # as on a GPU, but without the first forward pass
    server = start_server(model / "tiny.yaml", "model.dtype=bfloat16", f"serving.extra_args={json.dumps(extra)}")
    asyncio.run(wait_ready(server.url, 240, process=server.sidecar, log_path=server.log))
    yield server
    server.sidecar.stop()


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: w.bfloat16() for name, w in load_file(model / "model.safetensors").items()}


def test_the_server_holds_the_bytes_of_values_and_scales(
    fp8_server: LiveServer, config: Config, weights: dict[str, torch.Tensor], kind: str
) -> None:
    sink = make_weight_sink(config.serving, [fp8_server.url])
    sent = dict(quantize_stream(weights.items()))
    assert sum(name.endswith("_scale_inv") for name in sent) == 2 * (4 + 8 * 3 if kind == "experts" else 7)
    assert all(
        name in sent and sent[name].dtype == torch.bfloat16 for name in weights if name.endswith("mlp.gate.weight")
    )
    for number in (3, 4):  # the second one goes into weights that the server has processed once
        stats = sink.update(iter(weights.items()), version=number)
        assert fp8_server.version() == str(number)
        assert stats["num_tensors"] == len(sent)
        assert stats["bytes"] == sum(t.nbytes for t in sent.values())
    unquantised = sum(w.nbytes for w in weights.values())
    assert stats["bytes"] < 0.7 * unquantised  # not half: the embeddings of so small a model weigh a lot


@pytest.mark.parametrize(
    "victim", ["self_attn.v_proj.weight_scale_inv", "mlp.{}gate_proj.weight", "mlp.{}down_proj.weight_scale_inv"]
)
def test_one_wrong_bit_is_found_by_name(
    fp8_server: LiveServer, config: Config, weights: dict[str, torch.Tensor], victim: str, kind: str
) -> None:
    name = "model.layers.1." + victim.format("experts.5." if kind == "experts" else "")
    transport = make_transport(config.serving, torch.device("cpu"), {})
    send = transport.send

    def corrupt(bucket: Bucket, deadline: Deadline) -> None:
        send(Bucket(tuple((n, flipped(t) if n == name else t) for n, t in bucket.named)), deadline)

    transport.send = corrupt  # type: ignore[method-assign]
    sink = Fp8Sink(ServerSink(config.serving, [fp8_server.url], transport))
    with pytest.raises(WeightSyncError, match=f"tensor {name} .*checksum"):
        sink.update(iter(weights.items()), version=9)
    assert fp8_server.version() == "torn"


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1).view(torch.uint8)[-1] ^= 1
    return copy


def test_weights_without_scales_are_not_taken_for_fp8(
    fp8_server: LiveServer, config: Config, weights: dict[str, torch.Tensor]
) -> None:
    plain = config.serving.model_copy(update={"weight_dtype": "model"})
    with pytest.raises(WeightSyncError, match=r"cannot be audited|not auditable|_scale_inv"):
        make_weight_sink(plain, [fp8_server.url]).update(iter(weights.items()), version=10)
