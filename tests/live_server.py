"""A supervised SGLang server for tests, and the config of the tiny model it serves."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from torl_mega.errors import WeightSyncError
from torl_mega.process.start import GuardedProcess
from torl_mega.serving.sync.control import Call, Deadline

REPO = Path(__file__).parents[1]


@dataclass(frozen=True)
class LiveServer:
    """A server under its supervisor, as the launcher starts it."""

    url: str
    sidecar: GuardedProcess
    log: Path

    def version(self) -> str | None:
        """The version that its weights carry; None unless the server answers, its scheduler too."""
        with contextlib.suppress(WeightSyncError):
            Call(self.url, "/server_info", None, Deadline(10)).result()
            return Call(self.url, "/model_info", None, Deadline(10)).result()["weight_version"]
        return None


def write_config(folder: Path, model: Path, *, context: int = 1024) -> Path:
    """A config file for the tiny model: half of `context` for the prompt, half for the response."""
    tree = {
        "base": str(REPO / "conf" / "base.yaml"),
        "name": "tiny",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"max_prompt_tokens": context // 2},
        "rollout": {"max_response_tokens": context - context // 2, "prompts_per_step": 16, "group_size": 4},
        "trainer": {"mini_batch_samples": 64},
        "serving": {
            "max_total_tokens": 65536, "max_running_requests": 256, "bucket_mb": 1, "startup_timeout_s": 240,
            "request_timeout_s": 60, "sync_timeout_s": 30,
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
