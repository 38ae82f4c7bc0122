"""Real SGLang servers on CPU, shared by every suite of a session: at most two, started when first asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from live_server import LiveServer, write_config
from tiny_model import make_tiny_model

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.process.start import GuardedProcess, free_port
from torl_mega.process.start import start as start_process
from torl_mega.serving.sglang_server import wait_ready

LINES_SHOWN = 40


def pytest_configure() -> None:
    """A background job is born ignoring Ctrl-C, and so would be what the tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its servers and their supervisors said last."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        held = [v for value in item.funcargs.values() for v in (value if isinstance(value, tuple) else (value,))]
        for server in (v for v in held if isinstance(v, LiveServer)):
            for path in (server.log.parent / "serve.log", server.log):
                said = path.read_text(errors="replace").splitlines() if path.is_file() else ["(no such file)"]
                report.sections.append((f"{server.url}: {path.name}", "\n".join(said[-LINES_SHOWN:])))
    return report


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2 in HF layout, fp32."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_config_path(tiny_model: Path) -> Path:
    return write_config(tiny_model, tiny_model)


@pytest.fixture(scope="session")
def tiny_config(tiny_config_path: Path) -> Config:
    return load_config(tiny_config_path)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """Starts a supervised server without waiting for it."""
    started: list[GuardedProcess] = []

    def start(config_path: Path, *overrides: str) -> LiveServer:
        port, folder = free_port(), tmp_path_factory.mktemp("server")
        command = [sys.executable, "-m", "torl_mega.serving.serve", str(config_path), *overrides, "--port", str(port)]
        command += ["--log", str(folder / "sglang.log")]
        sidecar = start_process(command, name=f"serve:{port}", log_path=folder / "serve.log")
        started.append(sidecar)
        return LiveServer(f"http://127.0.0.1:{port}", sidecar, folder / "sglang.log")

    yield start
    for sidecar in started:
        sidecar.stop()


@pytest.fixture(scope="session")
def live_server(tiny_config_path: Path, start_server: Callable[..., LiveServer]) -> LiveServer:
    """The shared server. A test may change its weights; it must leave it running, unpaused."""
    server = start_server(tiny_config_path)
    asyncio.run(wait_ready(server.url, 280, process=server.sidecar, log_path=server.log))
    return server


@pytest.fixture(scope="session")
def two_servers(
    tiny_config_path: Path, start_server: Callable[..., LiveServer], live_server: LiveServer
) -> tuple[LiveServer, LiveServer]:
    """The shared server and a second one, which a test may kill: its supervisor brings it back."""
    second = start_server(tiny_config_path)
    asyncio.run(wait_ready(second.url, 280, process=second.sidecar, log_path=second.log))
    return live_server, second
