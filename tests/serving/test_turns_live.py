"""A real server that lets go of its memory and takes it back: what is left of it, and what it answers afterwards."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from live_server import LiveServer, write_config
from reference import Reference, random_weights
from test_faults import restarted, sglang_of
from test_weights import gap
from tiny_model import make_tiny_model

from torl_mega.config_file import load_config
from torl_mega.process.start import free_port
from torl_mega.process.start import start as start_process
from torl_mega.serving.gate import TrainerGate
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.serving.sync.control import Call, Deadline
from torl_mega.serving.sync.weights import make_weight_sink
from torl_mega.serving.turns import ASLEEP, EVERYTHING, NOTHING, WEIGHTS, SharedServers

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
KV_TOKENS = 400_000


@pytest.fixture(params=[1, 2], ids=["TP1", "TP2"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LiveServer, SharedServers, Path]]:
    """A server in turns, rank 0's hand on it, and the folder of a model of 60 MB that it serves."""
    model = make_tiny_model(tmp_path / "model", hidden_size=512, intermediate_size=4096)
    config, port, notes = write_config(tmp_path, model), free_port(), tmp_path / "status"
    notes.mkdir()
    command = [sys.executable, "-m", "torl_mega.serving.serve", str(config), f"serving.tensor={request.param}"]
    command += ["--port", str(port), "--kv-tokens", str(KV_TOKENS), "--in-turns", "--log", str(tmp_path / "sglang.log")]
    env = {**os.environ, "TORL_STATUS": str(notes)}
    with start_process(command, name="serve", log_path=tmp_path / "serve.log", env=env) as sidecar:
        server = LiveServer(f"http://127.0.0.1:{port}", sidecar, tmp_path / "sglang.log")
        asyncio.run(wait_ready(server.url, 280, process=sidecar, log_path=server.log))
        gate = TrainerGate(notes, 200)
        yield server, SharedServers([server.url], gate, limit_s=60, startup_s=200), tmp_path


def resident(server: LiveServer) -> int:
    """Bytes of the scheduler's process, of rank 0 of several."""
    tree = psutil.Process(server.sidecar.pid).children(recursive=True)
    schedulers = [p for p in tree if " ".join(p.cmdline()).startswith("sglang::scheduler")]
    return schedulers[0].memory_info().rss


def wait_for(server: LiveServer, note: Path, word: str) -> None:
    """What the side-car says of itself, as long as it lives."""
    while note.read_text() != word:
        assert server.sidecar.poll() is None
        time.sleep(0.05)


def test_memory_goes_and_comes_back_and_the_policy_with_the_sync(
    shared: tuple[LiveServer, SharedServers, Path],
) -> None:
    server, servers, folder = shared
    reference = Reference(folder / "model")
    config = load_config(folder / "tiny.yaml")
    sink = make_weight_sink(config.serving, [server.url])
    info = Call(server.url, "/server_info", None, Deadline(10)).result()
    assert info["max_total_num_tokens"] == KV_TOKENS
    sizes = {}
    for version in (1, 2):
        weights = random_weights(reference.original(), version)
        for _ in range(2):  # said twice, as to a server that has just come back
            assert servers.hold(NOTHING) == 1
        assert server.version() == ASLEEP
        sizes[f"asleep {version}"] = resident(server)
        assert servers.hold(WEIGHTS) == 1
        sizes[f"weights {version}"] = resident(server)
        sink.update(iter(weights.items()), version=version)
        assert servers.hold(EVERYTHING) == 1
        sizes[f"awake {version}"] = resident(server)
        assert server.version() == str(version)
        assert gap(server, reference, weights) < 1e-4
        assert servers.hold(WEIGHTS) == servers.hold(EVERYTHING) == 1  # around a save
        assert gap(server, reference, weights) < 1e-4
    tensor = int(info["tp_size"])
    kv = KV_TOKENS * 2 * 2 * 2 * 128 * 4 / tensor  # 2 layers, keys and values, 2 heads of 128, fp32
    num_bytes = sum(w.nbytes for w in reference.original().values()) / tensor
    assert sizes["awake 1"] - sizes["asleep 2"] > 0.95 * (kv + num_bytes), sizes
    assert sizes["awake 2"] - sizes["weights 2"] > 0.95 * kv, sizes
    servers.hold(NOTHING)
    servers.hold(EVERYTHING)
    assert not gap(server, reference, weights) < 1e-4, "weights that nobody sent must not look like the policy's"


def test_requests_under_way_are_ended_before_memory_goes(shared: tuple[LiveServer, SharedServers, Path]) -> None:
    server, servers, _ = shared
    answers = []

    def ask() -> None:
        params = {"max_new_tokens": 500, "ignore_eos": True, "temperature": 1.0}
        body = {"input_ids": list(range(40, 60)), "sampling_params": params}
        answers.append(Call(server.url, "/generate", body, Deadline(120)).result())

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    while not Call(server.url, "/v1/loads?include=core", None, Deadline(10)).result()["loads"][0]["num_running_reqs"]:
        time.sleep(0.01)
    assert servers.hold(NOTHING) == 1
    for thread in asking:
        thread.join(60)
    assert [a["meta_info"]["finish_reason"]["type"] for a in answers] == ["abort"] * 4


def test_a_server_that_dies_in_the_trainers_turn_waits_for_its_own(
    shared: tuple[LiveServer, SharedServers, Path],
) -> None:
    server, servers, folder = shared
    servers.hold(NOTHING)
    old = sglang_of(server)
    old.kill()
    psutil.wait_procs([old], timeout=20)
    note = next((folder / "status").glob("gpus_of_*"))
    wait_for(server, note, "waiting")
    assert servers.hold(WEIGHTS) == 0
    assert note.read_text() == "waiting", "it is the sync's turn"
    assert servers.hold(EVERYTHING) == 0
    servers.wait_for_one()
    restarted(server, old)
    wait_for(server, note, "up")
    assert servers.hold(NOTHING) == 1
    assert server.version() == ASLEEP
