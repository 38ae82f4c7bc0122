"""A run on disk: `runs/<name>/` with config.json, metrics.jsonl, tensorboard/, trajectories/, eval/, checkpoints/, hf/, logs/.

A run of the same name is resumed, provided that its recipe is the same; one process at a time may hold it.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torl_mega.config import Config
from torl_mega.config_file import config_hash
from torl_mega.errors import ConfigError
from torl_mega.run.files import write_json

# What may differ when a run goes on: where and how it runs and how often it reports, not what it learns from.
FREE = frozenset("name runs_dir num_steps sandbox serving parallel eval checkpoint guards logging cluster".split())
FREE_PARTS = frozenset(
    """
    trainer.micro_batch_tokens trainer.logprob_chunk_tokens trainer.recompute trainer.layer_spec trainer.overlap
    trainer.optimizer_offload trainer.deterministic trainer.gradient_bucket_parameters trainer.park_weights
    trainer.collective_timeout_s trainer.share_timeout_s rollout.max_concurrency rollout.trajectory_deadline_s
    """.split()
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where each thing of a run lies; nothing is made here."""

    path: Path

    @staticmethod
    def of(config: Config) -> RunFolder:
        return RunFolder(Path(config.runs_dir) / config.name)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def checkpoint(self, steps_done: int) -> Path:
        return self.checkpoints / f"step_{steps_done:05d}"


def make_folder(config: Config) -> RunFolder:
    """The run's folder, made or found again, with nothing of this config in it. Raises ConfigError."""
    folder = RunFolder.of(config)
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"runs_dir = {config.runs_dir!r}: cannot make {folder.path}: {exc.strerror}") from None
    return folder


def open_run(config: Config, *, free: frozenset[str] = frozenset()) -> RunFolder:
    """The run's folder with this config in it. Raises ConfigError when it holds a run with another recipe; a start that failed
    before anything was made holds none. `free`: further sections that may differ."""
    folder = make_folder(config)
    if not _is_empty(folder) and (different := other_recipe(folder, config, free=free)):
        raise ConfigError(
            f"{folder.path} holds a run with another recipe ({'; '.join(different[:3])}); "
            f"give this one a name of its own (name=…) or remove that folder"
        )
    write_json(_config_file(folder), {"config_hash": config_hash(config), "config": config.model_dump(mode="json")})
    return folder


def other_recipe(folder: RunFolder, config: Config, *, free: frozenset[str] = frozenset()) -> list[str]:
    """What the run in `folder` learns from otherwise than `config`, one text each; empty when there is none."""
    written = _config_file(folder)
    if not written.exists():
        return []
    return _differences(_recipe(_read_config(written), free), _recipe(config.model_dump(mode="json"), free))


def _config_file(folder: RunFolder) -> Path:
    return folder.path / "config.json"


def is_complete(folder: RunFolder, config: Config) -> bool:
    """Whether all that `config` asks for was done: its last step saved and summed up, the policy exported."""
    try:
        steps = json.loads(folder.summary.read_text())["steps"]
    except (OSError, ValueError, KeyError):
        return False
    return steps >= config.num_steps and (folder.hf.exists() or not config.checkpoint.export_hf)


def lock_run(folder: RunFolder) -> int:
    """An fd that holds the run until this process ends. Raises ConfigError when another process has it."""
    try:
        fd = os.open(folder.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise ConfigError(
            f"runs_dir: cannot write to {folder.path}: {exc.strerror}; choose another runs_dir=…"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(f"{folder.path} is in use by another process; wait for it or choose another name=…") from None
    return fd


def _is_empty(folder: RunFolder) -> bool:
    """Whether nothing was made: no step, evaluation or checkpoint."""
    made = (folder.trajectories, folder.evaluations, folder.checkpoints, folder.hf, folder.summary)
    try:
        rows = folder.metrics.read_bytes().splitlines()
    except FileNotFoundError:
        rows = []
    return not any(path.exists() for path in made) and all(row.startswith(b'{"kind": "sync"') for row in rows)


def _read_config(path: Path) -> dict[str, Any]:
    """The config a run was started with, with what has become a setting since then at its default."""
    try:
        return Config.model_validate(json.loads(path.read_text())["config"]).model_dump(mode="json")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{path} is not the config of a run that this version can go on with ({' '.join(str(exc).split())[:300]}); "
            f"choose another name=… or remove that folder"
        ) from None


def _recipe(tree: dict[str, Any], free: frozenset[str]) -> dict[str, Any]:
    flat = flatten({k: v for k, v in tree.items() if k not in FREE | free})
    return {k: v for k, v in flat.items() if k not in FREE_PARTS}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in sorted(old | new) if old.get(k) != new.get(k)]
