"""A server of a run with a secret: weights, generation and pauses are refused to who does not show it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import pytest

from torl_mega.config import Config
from torl_mega.errors import WeightSyncError
from torl_mega.process.start import free_port
from torl_mega.process.start import start as start_process
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.plugin import door
from torl_mega.serving.probe import prompt_logprobs
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.serving.sync.control import Call, Deadline
from torl_mega.types import GenerationRequest

SECRET = "a-secret-that-stands-nowhere-9b1d"
DOORS: list[tuple[str, dict | None]] = [
    ("/server_info", None),
    ("/model_info", None),
    ("/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}),
    ("/pause_generation", {"mode": "retract"}),
    ("/continue_generation", {}),
    ("/abort_request", {"rid": "x"}),
    ("/flush_cache", {}),
    ("/begin_weight_update", {"selector": "target"}),
    (
        "/init_weights_update_group",
        {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2},
    ),
    ("/update_weights_from_distributed", {"names": [], "dtypes": [], "shapes": []}),
    ("/update_weights_from_tensor", {"serialized_named_tensors": []}),
    ("/update_weights_from_disk", {"model_path": "/nowhere"}),
    ("/update_weight_version", {"new_version": "7"}),
    ("/weights_checker", {"action": "checksum"}),
]


def ask(url: str, path: str, body: dict | None) -> str:
    """The answer, or its refusal."""
    try:
        return str(Call(url, path, body, Deadline(30)).result())
    except WeightSyncError as exc:
        return str(exc)


def test_a_server_asks_for_the_secret_and_tells_nobody(
    tiny_config_path: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "sglang.log"
    words = [sys.executable, "-m", "torl_mega.serving.serve", str(tiny_config_path), "serving.hang_timeout_s=5"]
    words += ["--port", str(port), "--log", str(log)]
    env = {**os.environ, "TORL_SECRET": SECRET}
    with start_process(words, name="serve", log_path=tmp_path / "serve.log", env=env) as sidecar:
        asyncio.run(wait_ready(url, 280, process=sidecar, log_path=log))
        for path, body in DOORS:
            assert "HTTP 401" in ask(url, path, body), path
        monkeypatch.setenv("TORL_SECRET", "another")
        assert "HTTP 401" in ask(url, "/server_info", None)
        monkeypatch.setenv("TORL_SECRET", SECRET)
        info = ask(url, "/server_info", None)
        assert "startup_time" in info
        assert SECRET not in info
        assert ask(url, "/model_info", None).count("weight_version") == 1
        assert len(asyncio.run(prompt_logprobs(url, [1, 2, 3]))) == 3
        assert 1 <= len(asyncio.run(_sampled(url, tiny_config))) <= 4
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert SECRET not in file.read_text(errors="replace")
    texts = {file.name: file.read_text() for file in tmp_path.glob("*.log")}
    assert "server_args=" in texts["sglang.log"]  # where --api-key would stand
    assert not [name for name, text in texts.items() if SECRET in text]
    assert "restart" not in texts["serve.log"]  # the supervisor is let in


@pytest.mark.parametrize("argument", [{"tokenizer_worker_num": 2}, {"grpc_port": 9}], ids=str)
def test_what_would_leave_a_door_open_is_refused(monkeypatch: pytest.MonkeyPatch, argument: dict[str, int]) -> None:
    from sglang.srt.runtime_context import get_context, get_serving

    with get_context().override_server_args(**argument):
        assert door.with_keys(get_serving).api_key is None
        monkeypatch.setenv("TORL_SECRET", SECRET)
        with pytest.raises(ValueError, match=r"--tokenizer-worker-num > 1 or --grpc-port .* serving\.extra_args"):
            door.with_keys(get_serving)


async def _sampled(url: str, config: Config) -> tuple[int, ...]:
    async with SGLangClient([url], config.serving, vocab_size=512) as client:
        request = GenerationRequest(
            token_ids=(1, 2, 3), max_new_tokens=4, temperature=1.0, top_p=1.0, stop=(), seed=1, route_key="r"
        )
        return (await client.generate(request)).token_ids
