"""`torl try MODEL "problem"`: one answer with its tools, by what a run has trained, a checkpoint or an HF folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError
from torl_mega.launch.local import collect
from torl_mega.run.folder import RunFolder

BASE = Path(__file__).resolve().parents[2] / "conf" / "base.yaml"  # also from another folder than the project's


def attempt(model: Path, problem: str, conf: Path | None, overrides: Sequence[str]) -> int:
    """Starts a server and a sandbox for one attempt at `problem` and prints it turn by turn; the exit code. Nothing of it stays.

    Templates, tools and sampling are those of the run that `model` is, or belongs to; of an HF folder those of `conf`. Raises
    TorlError.
    """
    if not problem.strip():
        raise ConfigError('the problem is empty: torl try MODEL "What is 6*7?"')
    with tempfile.TemporaryDirectory(prefix="torl-try-") as folder:
        question, settings = Path(folder, "problem.jsonl"), Path(folder, "run.yaml")
        question.write_text(json.dumps({"problem": problem, "answer": "0"}) + "\n")
        one = {
            "name": "try", "runs_dir": folder, "num_steps": 1,
            "data.train": str(question), "data.source": None, "data.columns": None, "data.overlong_prompts": "error",
            "data.max_unreadable_golds": 1.0, "rollout.prompts_per_step": 1, "rollout.group_size": 1,
            "rollout.attempts_per_prompt": None, "rollout.replay": None, "rollout.oversample": 1.0,
            "trainer.mini_batch_samples": 1, "reward.function": None, "eval.data": [], "eval.benchmarks": {},
        }  # fmt: skip
        changes = [f"{key}={json.dumps(value)}" for key, value in one.items()]
        run, path = _run_of(model)
        if run is not None:
            settings.write_text(json.dumps(_settings_of(run)))
            conf, given = settings, [f"model.path={path}"]
        elif not (model / "config.json").is_file():
            raise ConfigError(
                f"{model} is no model: give a run, one of its checkpoints, or a folder with config.json and weights"
            )
        else:
            given = [f"model.path={model}"]
            if conf is None and _has_chat_template(model):
                given += ["data.template=chat", "rollout.protocol=chat"]
        return collect("try", load_config(conf or BASE, [*given, *overrides, *changes]), json=False)


def _run_of(model: Path) -> tuple[Path | None, Path]:
    """The run that `model` is or belongs to, and what of it is served."""
    if (model / "manifest.json").is_file():  # a checkpoint
        return model.resolve().parents[1], model
    if (model / "jobs").is_dir() and (model / "config.json").is_file():
        return model, _newest(model)
    return None, model


def _settings_of(run: Path) -> dict[str, Any]:
    """Raises ConfigError for a folder that is no run's."""
    try:
        return dict(json.loads((run / "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{run / 'config.json'} holds no run's settings ({type(exc).__name__}); give a run or a model"
        ) from exc


def _newest(run: Path) -> Path:
    """What a run has come to: its HF export, else its last checkpoint."""
    folder = RunFolder(run)
    if (folder.hf / "config.json").is_file():
        return folder.hf
    done = sorted(path for path in folder.checkpoints.glob("step_*") if (path / "manifest.json").is_file())
    if not done:
        raise ConfigError(f"{run} has neither an HF export nor a finished checkpoint to try")
    return done[-1]


def _has_chat_template(model: Path) -> bool:
    path = model / "tokenizer_config.json"
    said = path.read_text("utf-8", "replace") if path.is_file() else ""
    return (model / "chat_template.jinja").is_file() or '"chat_template"' in said
