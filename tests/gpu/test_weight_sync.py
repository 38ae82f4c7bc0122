"""What a CPU cannot run: NCCL, CUDA IPC, FP8 servers, and the GPU's checksum. Needs one or two CUDA devices.

Servers are started as on a cluster, by SGLang's own python, with bf16 weights and heads of 64: SGLang's default attention
on Hopper takes 16-bit types only (arg_groups/model_override_base.py:307-311 of 0.5.23).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fp8_reference import dequantize_blocks
from live_server import LiveServer, write_config
from tiny_model import make_tiny_model

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import WeightSyncError
from torl_mega.launch.commands import sglang_python
from torl_mega.process.start import GuardedProcess, free_port
from torl_mega.process.start import start as start_process
from torl_mega.serving.fp8 import is_quantized, quantize_blocks
from torl_mega.serving.gate import TrainerGate
from torl_mega.serving.plugin.checksum import checksum, word_sum
from torl_mega.serving.probe import prompt_logprobs
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.weights import ServerSink, make_transport, make_weight_sink
from torl_mega.serving.turns import EVERYTHING, NOTHING, WEIGHTS, SharedServers

pytestmark = pytest.mark.gpu
PROBE = tuple(range(40, 72))


@pytest.fixture(scope="module")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("gpu_model"), hidden_size=256, intermediate_size=384)


@pytest.fixture(scope="module")
def gpu_server(gpu_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    started: list[GuardedProcess] = []

    def start(gpu: int, *overrides: str) -> LiveServer:
        folder = tmp_path_factory.mktemp("gpu")
        config, port = write_config(folder, gpu_model), free_port()
        command = [sglang_python(), "-m", "torl_mega.serving.serve", str(config), "model.dtype=bfloat16", *overrides]
        command += ["--port", str(port), "--gpu-ids", str(gpu), "--log", str(folder / "sglang.log")]
        sidecar = start_process(command, name="gpu server", log_path=folder / "serve.log")
        started.append(sidecar)
        server = LiveServer(f"http://127.0.0.1:{port}", sidecar, folder / "sglang.log")
        asyncio.run(wait_ready(server.url, 600, process=sidecar, log_path=server.log))
        return server

    yield start
    for sidecar in started:
        sidecar.stop()


def weights_on(device: str, gpu_model: Path, seed: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(w.shape, generator=generator) * 0.1 + ("norm" in name)).to(device, torch.bfloat16)
        for name, w in load_file(str(gpu_model / "model.safetensors")).items()
    }


def expected_logprobs(gpu_model: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(str(gpu_model), dtype=torch.float32).eval()
    model.load_state_dict({name: w.cpu() for name, w in weights.items()})
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        table = model(ids).logits[0].log_softmax(-1)
    return table[torch.arange(len(PROBE) - 1), ids[0, 1:]]


def gap_to_hf(server: LiveServer, model: Path, weights: dict[str, torch.Tensor]) -> float:
    """Mean difference of the probe's log-probs to HF in fp32 with these weights; bf16 as in test_trainer_gpu.py: 2e-2."""
    there = torch.from_numpy(asyncio.run(prompt_logprobs(server.url, PROBE)))[1:]
    return float((there - expected_logprobs(model, weights)).abs().mean())


@pytest.mark.parametrize("transport", ["broadcast", "handles"])
def test_a_sync_on_gpus_is_verified_and_a_wrong_bit_found(
    gpu_server: Callable[..., LiveServer], gpu_model: Path, transport: str
) -> None:
    """NCCL wants two devices; CUDA IPC shares one."""
    if transport == "broadcast" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL cannot put two ranks on one device")
    server = gpu_server(1 if transport == "broadcast" else 0, "serving.mem_fraction=0.2")
    config: Config = load_config(
        server.log.parent / "tiny.yaml", ["model.dtype=bfloat16", f"serving.transport={transport}"]
    )
    sink = make_weight_sink(config.serving, [server.url], device="cuda:0")
    weights = weights_on("cuda:0", gpu_model, 1)
    sink.update(iter(weights.items()), version=1)
    assert gap_to_hf(server, gpu_model, weights) < 2e-2

    inner = make_transport(config.serving, torch.device("cuda:0"), {})
    send = inner.send

    def corrupt(bucket: Bucket, deadline: object) -> None:
        name, tensor = bucket.named[0]
        wrong = tensor.clone()
        wrong.view(-1)[0] += 1
        send(Bucket(((name, wrong), *bucket.named[1:])), deadline)  # type: ignore[arg-type]

    inner.send = corrupt  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="checksum"):
        ServerSink(config.serving, [server.url], inner).update(iter(weights.items()), version=2)


def test_fp8_servers_compute_with_what_the_policy_rounds_to(
    gpu_server: Callable[..., LiveServer], gpu_model: Path
) -> None:
    fp8 = ("model.dtype=bfloat16", "serving.weight_dtype=fp8_block", "serving.transport=handles")
    server = gpu_server(0, *fp8, "serving.mem_fraction=0.2")
    config = load_config(server.log.parent / "tiny.yaml", fp8)
    sink = make_weight_sink(config.serving, [server.url], device="cuda:0")
    for version in (1, 2):
        weights = weights_on("cuda:0", gpu_model, version)
        sink.update(iter(weights.items()), version=version)
        rounded = {n: dequantize_blocks(*quantize_blocks(w)) if is_quantized(n) else w for n, w in weights.items()}
        assert gap_to_hf(server, gpu_model, rounded) < 0.1  # activations are rounded to FP8 too


def test_the_memory_saver_gives_memory_back(gpu_server: Callable[..., LiveServer], gpu_model: Path) -> None:
    tokens = 20_000_000  # of 1 KiB: 2 layers, keys and values, 2 heads of 64, bf16
    room = ("--in-turns", "--kv-tokens", str(tokens), "--mem-fraction", "0.8")
    server = gpu_server(0, *room)
    servers = SharedServers([server.url], TrainerGate(None, 60), limit_s=60, startup_s=60)
    awake = torch.cuda.mem_get_info(0)[0]
    servers.hold(NOTHING)
    asleep = torch.cuda.mem_get_info(0)[0]
    assert asleep - awake > 0.9 * tokens * 2 * 2 * 2 * 64 * 2
    servers.hold(WEIGHTS)
    config = load_config(server.log.parent / "tiny.yaml", ["model.dtype=bfloat16", "serving.transport=handles"])
    weights = weights_on("cuda:0", gpu_model, 5)
    make_weight_sink(config.serving, [server.url], device="cuda:0").update(iter(weights.items()), version=5)
    servers.hold(EVERYTHING)
    assert gap_to_hf(server, gpu_model, weights) < 2e-2


@pytest.mark.parametrize("numel", [1, 16383, 16384, 5_000_001])
def test_the_gpu_checksum_is_the_same_on_every_device(numel: int) -> None:
    tensor = torch.randint(0, 255, (numel,), dtype=torch.uint8)
    assert checksum(tensor.cuda(), "cuda") == f"{word_sum(tensor):016x}" == checksum(tensor, "cuda")
