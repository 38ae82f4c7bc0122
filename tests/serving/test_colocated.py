"""Weights handed to each server by the trainer's ranks beside it: real SGLang, real Megatron ranks, by value on a CPU."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import LiveServer
from reference import Reference, random_weights
from test_faults import restarted, sglang_of
from test_weights import gap
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from torl_mega.process.start import free_port
from torl_mega.serving.plugin.weight_receive import _mapped
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.serving.sync import handles
from torl_mega.serving.sync.buckets import Bucket

WORKER = Path(__file__).with_name("colocated_worker.py")
REPO = Path(__file__).parents[2]
NEXT = REPO / "build/mcore-next"


def sync(
    folder: Path, conf: Path, servers: dict[str, str], scenario: list[str], *overrides: str, ranks: int = 2
) -> list[dict[str, Any]]:
    """Starts the ranks, lets them sync as `scenario` says, and returns what rank 0 reports. `servers`: URL -> ranks beside."""
    out, port = folder / "out.json", free_port()
    common = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "TORL_TRANSPORT": "handles", "TORL_SERVERS": ",".join(servers), "TORL_OWNERS": ";".join(servers.values()),
        "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [sys.executable, str(WORKER), str(conf), json.dumps(scenario), str(out), *overrides]
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        codes = [process.wait(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    wanted = [0, -signal.SIGKILL] if "die" in scenario else [0] * ranks
    assert codes == wanted, "\n".join(log.read_text()[-3000:] for log in logs)
    return json.loads(out.read_text())


@pytest.fixture
def other_weights(reference: Reference, tmp_path: Path, tiny_model: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Weights that no server has, and a model folder of them."""
    weights = random_weights(reference.original(), 301)
    reference.load(weights)
    reference.model.save_pretrained(tmp_path / "model")
    for file in tiny_model.glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return weights, tmp_path / "model"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("cut", "ranks"),
    [("tensor=2", 2), ("pipeline=2", 2), ("data=2", 2), pytest.param("tensor=2", 4, marks=pytest.mark.slow)],
)
def test_each_server_gets_the_weights_from_the_rank_beside_it(
    two_servers: tuple[LiveServer, LiveServer], tiny_config_path: Path, reference: Reference,
    other_weights: tuple[dict[str, torch.Tensor], Path], tmp_path: Path, cut: str, ranks: int,
) -> None:  # fmt: skip
    weights, model = other_weights
    beside = {two_servers[0].url: "0", two_servers[1].url: str(ranks - 1)}
    (stats,) = sync(tmp_path, tiny_config_path, beside, [""], f"model.path={model}", f"parallel.{cut}", ranks=ranks)
    assert stats["num_servers"] == 2
    assert stats["bytes"] == sum(w.nbytes for w in weights.values())
    for server in two_servers:
        assert server.version() == "1"
        assert gap(server, reference, weights) < 1e-4


@pytest.mark.timeout(600)
def test_a_server_of_two_ranks_gets_one_payload_from_each(
    start_server: Any, tiny_config_path: Path, reference: Reference,
    other_weights: tuple[dict[str, torch.Tensor], Path], tmp_path: Path,
) -> None:  # fmt: skip
    weights, model = other_weights
    server = start_server(tiny_config_path, "serving.tensor=2")
    try:
        asyncio.run(wait_ready(server.url, 280, process=server.sidecar, log_path=server.log))
        for beside in ("0,1", "1,0"):
            (stats,) = sync(
                tmp_path, tiny_config_path, {server.url: beside}, [""], f"model.path={model}", "parallel.data=2"
            )
            assert stats["num_servers"] == 1
            assert gap(server, reference, weights) < 1e-4
        # the wrong bit lies in a row of the embedding that the server's rank 0 keeps: only its own payload can bring it there
        arguments = [f"model.path={model}", "parallel.data=2"]
        (unread,) = sync(tmp_path, tiny_config_path, {server.url: "0,1"}, ["flip"], *arguments)
        assert unread["num_servers"] == 1
        (found,) = sync(tmp_path, tiny_config_path, {server.url: "1,0"}, ["flip"], *arguments)
        assert f"{server.url} rank 0: tensor model.embed_tokens.weight" in found["text"]
        (wrong,) = sync(tmp_path, tiny_config_path, {server.url: "1"}, [""], f"model.path={model}", "parallel.data=2")
        assert "has 2 ranks, the placement says 1" in wrong["text"]
    finally:
        server.sidecar.stop()


@pytest.mark.timeout(600)
def test_what_goes_wrong_beside_a_server_is_said_by_rank_0(
    two_servers: tuple[LiveServer, LiveServer], tiny_config_path: Path, tmp_path: Path
) -> None:
    """A wrong bit that rank 1 hands over, a server that dies while both ranks send, and then a rank that does."""
    steady, victim = two_servers
    old = sglang_of(victim)
    beside = {steady.url: "0", victim.url: "1"}
    scenario = ["flip", "", f"kill:{old.pid}", "", "die"]
    flip, good, lost, without, died = sync(tmp_path, tiny_config_path, beside, scenario, "parallel.data=2")
    assert f"{victim.url} rank 0: tensor model.embed_tokens.weight (elements" in flip["text"]
    assert good["num_servers"] == 2
    assert lost["error"] == "ServerLost"
    assert victim.url in lost["text"]
    assert (without["num_servers"], without["num_servers_down"]) == (1, 1)
    assert died["error"] == "WeightSyncError"
    assert died["text"].startswith("trainer ranks 0, 1 in a weight sync: ")
    assert "\n" not in died["text"]
    assert died["after_s"] < 20
    restarted(victim, old)


def test_sglang_reads_the_payload() -> None:
    """Its own deserialiser and loader on a bucket by value."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = Bucket(
        (("a", torch.randn(3, 5)), ("b", torch.randn(7).bfloat16()), ("c", torch.ones((), dtype=torch.uint8)))
    )
    flat = bucket.flatten_into(torch.empty(bucket.num_bytes, dtype=torch.uint8))
    read = MultiprocessingSerializer.deserialize(handles.payload(bucket, flat).decode())
    again = FlattenedTensorBucket(flattened_tensor=read["flattened_tensor"], metadata=read["metadata"])
    for (name, tensor), (expected_name, expected) in zip(again.reconstruct_tensors(), bucket.named, strict=True):
        assert name == expected_name
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_a_bucket_is_read_where_a_rank_has_it_and_its_memory_goes_with_it() -> None:
    named = (("a", torch.randn(3, 5)), ("b", torch.randn(7).bfloat16()), ("c", torch.ones((), dtype=torch.uint8)))
    bucket = Bucket(named)
    room = handles.SharedMemory(bucket.num_bytes + 1000)
    bucket.flatten_into(room.bytes)
    read = dict(_mapped(room.path, bucket.names, bucket.dtypes, bucket.shapes))
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in named)
    room.bytes[0] ^= 1
    assert not torch.equal(read["a"], named[0][1])  # the same memory
    path = room.path
    del room
    assert not Path(path).exists()
    with pytest.raises(RuntimeError, match="No such file"):
        _mapped(path, bucket.names, bucket.dtypes, bucket.shapes)


class Handle:
    """Pickles as a CUDA tensor on the GPU of this UUID does; torch itself says with which arguments."""

    ARGUMENTS = (
        torch.Tensor, torch.Size([4]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 3, b"handle", 4, 0, False, b"counter",
        0, b"event", True,
    )  # fmt: skip

    def __reduce__(self) -> Any:
        return rebuild_cuda_tensor, handles.by_uuid(self.ARGUMENTS, "GPU-1234")


OPEN = """
import sys
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
monkey_patch_torch_reductions()
MultiprocessingSerializer.deserialize(sys.stdin.read())
"""


def test_sglang_accepts_a_handle_and_looks_its_device_up_by_uuid() -> None:
    """As a server's rank does, in a process of its own: past every check of names, to a GPU that is not here."""
    text = handles.payload(Bucket((("a", torch.ones(1)),)), Handle())  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", OPEN], input=text.decode(), capture_output=True, text=True, timeout=120, check=False
    )
    assert "Invalid device_uuid=GPU-1234" in done.stderr


BY_VALUE = """
import megatron.core, torch
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.handles import payload
assert torch.storage._load_from_bytes.__code__.co_filename.endswith("megatron/core/safe_globals.py")
flat = torch.arange(8, dtype=torch.uint8)
print(payload(Bucket((("a", flat),)), flat).decode())
"""


@pytest.mark.skipif(not NEXT.is_dir(), reason="run `make mcore-next`")
def test_sglang_reads_by_value_what_a_trainer_with_the_newer_megatron_sends() -> None:
    """megatron-core 0.19.2 replaces torch's loader of storages, whose name stands in the pickle, when it is imported."""
    env = {**os.environ, "PYTHONPATH": str(NEXT)}
    sent = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BY_VALUE],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", OPEN],
        input=sent.stdout.split()[-1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
