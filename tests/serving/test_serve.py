"""The side-car as a program: what it says when it cannot start, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live_server import LiveServer, write_config

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import ServerError
from torl_mega.process.start import free_port, port_in_use
from torl_mega.process.start import start as start_process
from torl_mega.serving.sglang_server import CONTEXT_SLACK, ON_CPU, launch_command, launch_env, wait_ready


def serve(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torl_mega.serving.serve", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_port_in_use_is_one_clear_line(tiny_config_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = serve(str(tiny_config_path), "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == (
        f"torl: error: port {port} on 127.0.0.1 is in use; stop what listens there or choose another --port\n"
    )


def test_a_missing_model_and_a_context_too_long_are_one_clear_line(tiny_config_path: Path, tmp_path: Path) -> None:
    port = str(free_port())
    done = serve(str(tiny_config_path), f"model.path={tmp_path}/none", "--port", port)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"torl: error: model.path = {tmp_path}/none: no config.json there")
    done = serve(
        str(tiny_config_path), "rollout.max_response_tokens=4000", "trainer.micro_batch_tokens=8192", "--port", port
    )
    assert done.returncode == 1
    assert "4512 tokens" in done.stderr
    assert "max_position_embeddings 2048" in done.stderr


def test_a_server_that_dies_in_start_up_shows_its_log(tiny_config_path: Path, tmp_path: Path) -> None:
    log = tmp_path / "sglang.log"
    port = str(free_port())
    done = serve(str(tiny_config_path), "serving.extra_args=[--no-such-option]", "--port", port, "--log", str(log))
    assert done.returncode == 1
    assert "died while starting (exit code 2); the end of" in done.stderr
    assert "no-such-option" in done.stderr


def test_a_server_that_is_not_ready_in_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with start_process(["sh", "-c", "echo still loading; sleep 60"], name="slow", log_path=log) as child:
        url = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(ServerError, match=r"not ready after 0\.5 s; the end of(.|\n)*still loading"):
            asyncio.run(wait_ready(url, 0.5, process=child, log_path=log))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives_the_sidecar(tiny_config_path: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Killed while SGLang is still starting its processes, the worst moment."""
    port = free_port()
    command = [sys.executable, "-m", "torl_mega.serving.serve", str(tiny_config_path), "--port", str(port)]
    sidecar = subprocess.Popen([*command, "--log", str(tmp_path / "log")], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    tree: list[psutil.Process] = []
    while len(tree) < 3 and time.monotonic() < deadline:  # reaper, SGLang, its first child
        tree = psutil.Process(sidecar.pid).children(recursive=True)
        time.sleep(0.05)
    assert len(tree) >= 3
    sidecar.send_signal(how)
    assert sidecar.wait(10) == (0 if how is signal.SIGTERM else -how)
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not port_in_use("127.0.0.1", port)


def test_the_command_line_says_what_the_config_says(tiny_config: Config) -> None:
    command = launch_command(tiny_config, host="127.0.0.1", port=4000, on_gpu=False)
    options = dict(zip(command[3::2], command[4::2], strict=False))
    assert options["--context-length"] == str(tiny_config.max_context_tokens + CONTEXT_SLACK)
    assert options["--device"] == "cpu"
    assert options["--dtype"] == "float32"
    assert "--mem-fraction-static" not in options
    other = launch_command(tiny_config, host="127.0.0.1", port=4001, on_gpu=True)
    gpu = dict(zip(other[3::2], other[4::2], strict=False))
    assert gpu["--mem-fraction-static"] == str(tiny_config.serving.mem_fraction)
    assert not {option for option in ON_CPU if option.startswith("--")} & set(other)
    assert command[command.index("--device") :][: len(ON_CPU)] == list(ON_CPU)
    assert gpu["--random-seed"] != options["--random-seed"]
    assert (options["--nccl-port"], gpu["--nccl-port"]) == ("4001", "4002"), "drawn by nobody else on this machine"
    env = launch_env(tiny_config, gpu_ids=(2, 3), base={"RANK": "0", "PATH": "/bin", "http_proxy": "http://proxy:3128"})
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert env["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0", "trainer ranks share these GPUs"
    cluster = tiny_config.cluster.model_copy(update={"placement": "disaggregated", "server_nodes": 1})
    apart = launch_env(tiny_config.model_copy(update={"cluster": cluster}), gpu_ids=(2, 3), base={})
    assert "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK" not in apart
    assert not {"RANK", "http_proxy"} & set(env)


def test_a_head_in_fp32_is_asked_of_the_servers_too(tmp_path: Path, tiny_model: Path) -> None:
    for asked in (True, False):
        config = load_config(write_config(tmp_path, tiny_model), [f"model.fp32_head={str(asked).lower()}"])
        command = launch_command(config, host="127.0.0.1", port=4000, on_gpu=False)
        assert ("--enable-fp32-lm-head" in command) == asked


def test_without_a_prefix_cache_servers_keep_none(tmp_path: Path, tiny_model: Path) -> None:
    for asked in (True, False):
        config = load_config(write_config(tmp_path, tiny_model), [f"serving.prefix_cache={str(asked).lower()}"])
        command = launch_command(config, host="127.0.0.1", port=4000, on_gpu=False)
        assert ("--disable-radix-cache" in command) != asked


def test_emptying_the_cache_on_a_cpu_collects_no_garbage() -> None:
    """SGLang does it at every flush, over everything that it ever imported; and the platform that it finds is ours."""
    code = """
import gc
from sglang.srt.platforms import current_platform
from torl_mega.serving.plugin.native_cpu import NativeCpuPlatform
assert type(current_platform).__name__ == NativeCpuPlatform.__name__, current_platform
gc.disable()
loop = []; loop.append(loop); mark = gc.get_count()
current_platform.empty_cache()
print("collected" if gc.get_count()[0] < mark[0] else "kept")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "kept"


def test_a_small_cache_still_holds_one_whole_context(tmp_path: Path, tiny_model: Path) -> None:
    config = load_config(write_config(tmp_path, tiny_model), ["serving.max_total_tokens=16"])
    command = launch_command(config, host="127.0.0.1", port=4000, on_gpu=False)
    total = command[command.index("--max-total-tokens") + 1]
    assert int(total) == config.max_context_tokens + CONTEXT_SLACK


def test_the_server_binds_this_machine_only(live_server: LiveServer) -> None:
    port = int(live_server.url.rpartition(":")[2])
    tree = psutil.Process(live_server.sidecar.pid).children(recursive=True)
    sockets = [c for p in tree for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in sockets if c.laddr.port == port} == {"127.0.0.1"}


@pytest.mark.skipif(bool(os.environ.get("CUDA_VISIBLE_DEVICES")), reason="CUDA does not survive a fork")
def test_scheduler_and_detokenizer_are_forks_of_the_http_process(live_server: LiveServer) -> None:
    """A spawned process would have mapped torch anew, somewhere else."""
    where = {
        p.name(): part.addr.partition("-")[0]
        for p in psutil.Process(live_server.sidecar.pid).children(recursive=True)
        for part in p.memory_maps(grouped=False)
        if "libtorch_cpu" in part.path
    }
    assert {"sglang::scheduler", "sglang::detokenizer"} < where.keys()
    assert len(set(where.values())) == 1
