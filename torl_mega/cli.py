"""`torl`: one thin command per job. Engines are imported by the processes that use them, not here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from torl_mega.config import Config
from torl_mega.errors import TorlError
from torl_mega.run_folder import RunFolder

app = typer.Typer(
    name="torl",
    help="Tool-integrated RL at cluster scale: Megatron-Core trains, SGLang samples, a sandbox runs the code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sandbox_app = typer.Typer(help="The code sandbox as a service.", no_args_is_help=True)
app.add_typer(sandbox_app, name="sandbox")

Conf = Annotated[Path, typer.Argument(metavar="CONF", help="A YAML file, e.g. conf/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[A.B=VALUE]...", help="Overrides; the last one wins")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON")]


@app.command()
def train(conf: Conf, overrides: Overrides = None) -> None:
    """Train on this machine: starts sandbox, servers and ranks, or resumes the run of that name."""
    from torl_mega import launcher
    from torl_mega.config_file import load_config

    args = [str(conf), *(overrides or [])]
    raise typer.Exit(launcher.train(load_config(conf, overrides or []), args))


@app.command("eval")
def evaluate(conf: Conf, overrides: Overrides = None, json: Json = False) -> None:
    """Score the checkpoint at model.path on eval.data; prints a table beside the paper's."""
    from torl_mega import standalone

    _with_servers(conf, overrides, lambda config, folder: standalone.evaluate(config, folder, as_json=json))


@app.command()
def rollout(conf: Conf, overrides: Overrides = None, json: Json = False) -> None:
    """Collect trajectories without training; `rollout.replay=RUN` trains on them later."""
    from torl_mega import standalone

    _with_servers(conf, overrides, lambda config, folder: standalone.collect(config, folder, as_json=json))


def _with_servers(conf: Path, overrides: list[str] | None, program: Callable[[Config, RunFolder], int]) -> None:
    from torl_mega import launcher
    from torl_mega.config_file import load_config

    args = [str(conf), *(overrides or [])]
    raise typer.Exit(launcher.with_servers(load_config(conf, overrides or []), args, program))


def main() -> None:
    """Console entry point: a TorlError is one line and exit code 1."""
    try:
        app()
    except TorlError as exc:
        print(f"torl: error: {exc}", file=sys.stderr)
        sys.exit(1)
