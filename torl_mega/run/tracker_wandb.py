"""Weights & Biases through its own library. Contract: implements `Tracker`; `step` is the x axis of every metric."""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torl_mega.config import WandbConfig


def open_wandb(
    config: WandbConfig, folder: Path, name: str, settings: Mapping[str, str | float | bool], run_id: str | None
) -> tuple[Wandb, str]:
    """The run, begun or, with the id of an earlier process, gone on with."""
    import wandb

    mode = config.mode or os.environ.get("WANDB_MODE") or "online"
    chosen = run_id or secrets.token_hex(6)
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        tags=list(config.tags),
        name=name,
        id=chosen,
        dir=str(folder),
        config=dict(settings),
        mode=mode,  # pyright: ignore[reportArgumentType]  # the library refuses what it does not know
        resume="allow" if mode == "online" else None,
        reinit="create_new",
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Wandb(run), chosen


class Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        """As preformatted HTML in which nothing a model wrote is markup."""
        import wandb

        self._run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def close(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
