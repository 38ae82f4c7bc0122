"""`torl`: one thin command per job. Engines are imported by the processes that use them, not here."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, TextIO

import typer

from torl_mega.errors import TorlError

app = typer.Typer(
    name="torl",
    help="Tool-integrated RL at cluster scale: Megatron-Core trains, SGLang samples, a sandbox runs the code.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sandbox_app = typer.Typer(help="The code sandbox as a service.", no_args_is_help=True)
app.add_typer(sandbox_app, name="sandbox")

Conf = Annotated[Path, typer.Argument(metavar="CONF", help="A YAML file, e.g. conf/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[A.B=VALUE]...", help="Overrides; the last one wins")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line as the run goes on")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON")]

NOBODY_READS = 128 + 13  # as a shell has it for a process that SIGPIPE ended


@app.callback()
def torl(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and stop")] = False,
) -> None:
    if version:
        from torl_mega import __version__

        print(f"torl {__version__}")
        raise typer.Exit


@app.command()
def train(
    conf: Conf,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check all that needs no server and no trainer")
    ] = False,
    json: JsonLines = False,
) -> None:
    """Train on this machine: starts sandbox, servers and ranks, or resumes the run of that name."""
    from torl_mega.config_file import load_config
    from torl_mega.launch import dry_run as dry
    from torl_mega.launch import local as launcher

    config = load_config(conf, overrides or [])
    raise typer.Exit(dry.run(config) if dry_run else launcher.train(config, json=json))


@app.command()
def pretrain(conf: Conf, overrides: Overrides = None) -> None:
    """Train on texts: a base model, or the cold start of one (docs/pretraining.md). Resumes as `train` does."""
    from torl_mega.config_file import load_config
    from torl_mega.launch import local as launcher

    raise typer.Exit(launcher.pretrain(load_config(conf, overrides or [])))


@app.command("eval")
def evaluate(conf: Conf, overrides: Overrides = None, json: JsonLines = False) -> None:
    """Score the checkpoint at model.path on eval.data; prints a table beside the paper's."""
    _collect("eval", conf, overrides, json)


@app.command()
def rollout(conf: Conf, overrides: Overrides = None, json: JsonLines = False) -> None:
    """Collect trajectories without training; `rollout.replay=RUN` trains on them later."""
    _collect("rollout", conf, overrides, json)


@app.command("try")
def attempt(
    model: Annotated[Path, typer.Argument(help="A run, one of its checkpoints, or an HF folder")],
    problem: Annotated[str, typer.Argument(help="What is asked")],
    overrides: Overrides = None,
    conf: Annotated[
        Path | None, typer.Option(help="Settings for an HF folder (default: the project's conf/base.yaml)")
    ] = None,
) -> None:
    """Answer one problem with the tools of a run, turn by turn."""
    from torl_mega.launch.attempt import attempt

    raise typer.Exit(attempt(model, problem, conf, overrides or []))


@app.command()
def plan(
    conf: Conf,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes; default cluster.nodes")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs per node; default cluster.gpus_per_node")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, cpu or auto")] = "auto",
    search: Annotated[bool, typer.Option("--search", help="Propose the best layouts")] = False,
    mean_response: Annotated[int | None, typer.Option(help="Expected tokens per response")] = None,
    commands: Annotated[bool, typer.Option("--commands", help="Also every process that would be started")] = False,
    json: Json = False,
) -> None:
    """Predict placement, memory per phase and step time of a run, without a GPU. Exit code 1 when it does not fit."""
    from torl_mega.launch import plan as planner

    options = planner.PlanOptions(
        nodes, gpus, gpu, search=search, json_output=json, mean_response=mean_response, commands=commands
    )
    raise typer.Exit(planner.run(conf, overrides or [], options))


@app.command()
def doctor(
    conf: Annotated[Path | None, typer.Argument(metavar="[CONF]", help="Also check what this config needs")] = None,
    overrides: Overrides = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Also run the engines on the GPUs: about a minute")] = False,
    json: Json = False,
) -> None:
    """Say what this machine has and lacks: engines, GPUs, sandbox tier, disk, ports, model and data."""
    from torl_mega.launch import doctor as checks

    raise typer.Exit(checks.run(conf, overrides or [], json_output=json, gpu=gpu))


@app.command()
def config(
    conf: Conf,
    overrides: Overrides = None,
    only: Annotated[str, typer.Option(help="Only settings that start so, e.g. rollout.")] = "",
    json: Json = False,
) -> None:
    """Print every setting with its value, where it comes from and what it means."""
    from torl_mega.launch import show_config

    raise typer.Exit(show_config.run(conf, overrides or [], only=only, json_output=json))


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/quickstart")]


@app.command()
def view(
    run: Run,
    others: Annotated[list[Path] | None, typer.Argument(metavar="[OTHER]...", help="Runs to lay beside it")] = None,
    step: Annotated[int | None, typer.Option(help="Bring only this step up to date, and open there")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many trajectories of each step")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder, default RUN/view; or a file *.html with one step")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Serve the page on 127.0.0.1 while the run trains")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --follow; 0 takes a free one")] = 0,
    audit: Annotated[bool, typer.Option("--audit", help="Prove every token instead of making a page")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Default: the run's model.path")] = None,
    json: Json = False,
) -> None:
    """Make a page of the recorded trajectories to look into, or audit them token by token."""
    from torl_mega.rollout.audit_rules import rules_of
    from torl_mega.view import command

    options = command.Options(step=step, limit=limit, out=out, tokenizer=tokenizer, as_json=json)
    if follow:
        raise typer.Exit(command.follow(run, others or [], options, port=port))
    raise typer.Exit(command.view(run, others or [], options, audit=rules_of if audit else None))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders to compare")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes; default RUN/report.html")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write accuracy and tool use as a picture")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown; - prints them")] = None,
    x: Annotated[Literal["step", "tokens", "time"], typer.Option("--x", help="What the curves run against")] = "step",
    smooth: Annotated[int | None, typer.Option(min=1, help="Steps a line averages; default 16 for long runs")] = None,
    paper: Annotated[Literal["1.5b", "7b"] | None, typer.Option(help="Draw the end points of ToRL's model")] = None,
    json: Json = False,
) -> None:
    """Compare runs on one static HTML page: curves, settings that differ, benchmarks, tools, faults."""
    from torl_mega.view import report as pages

    options = pages.Options(axis=x, window=smooth, size=paper)
    raise typer.Exit(pages.report(runs, out, options=options, png=png, markdown=markdown, as_json=json))


@sandbox_app.command("serve")
def sandbox_serve(
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port and says which")] = 8080,
    socket: Annotated[str | None, typer.Option(help="Also listen on this unix socket")] = None,
    tier: Annotated[Literal["auto", "A", "B", "C"], typer.Option(help="auto is the best this machine has")] = "auto",
) -> None:
    """Serve the sandbox over HTTP with SandboxFusion's API until SIGTERM."""
    from torl_mega.config import SandboxConfig
    from torl_mega.sandbox.serve import serve

    raise typer.Exit(serve(socket=socket, host=host, port=port, config=SandboxConfig(tier=tier)))


def _collect(program: str, conf: Path, overrides: list[str] | None, json: bool) -> None:
    from torl_mega.config_file import load_config
    from torl_mega.launch import local as launcher

    raise typer.Exit(launcher.collect(program, load_config(conf, overrides or []), json=json))


def _refuse_dashes(words: list[str]) -> None:
    """Settings are written without dashes; what looks like one with them would be called an unknown option."""
    for word in (word for word in words if word.startswith("--")):
        from torl_mega.config import Config  # not for commands without options: it takes a while

        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        dotted = "." in name and all(part.isidentifier() for part in name.split("."))
        if name in Config.model_fields or dotted:
            raise TorlError(f"{word}: settings are written {name}=VALUE, without dashes")


def main() -> None:
    """Console entry point and the one boundary for errors: what a user can mend is one line and exit code 1.

    A `TorlError` says it; so does an OSError with the file that it is about (a full disk, a folder where a file should be).
    TORL_TRACEBACK=1 shows where one came from. Whoever reads our output may stop reading (`| head`): that ends us silently.
    """
    try:
        sys.exit(_run())
    except TorlError as exc:
        error = str(exc)
    except BrokenPipeError:
        sys.stderr.flush()
        os._exit(NOBODY_READS)  # without Python's flush at exit, which would complain
    except OSError as exc:
        error = _in_words(exc)
    except UnicodeDecodeError as exc:
        error = f"a file that was to be read is not UTF-8 text: {exc.reason} at byte {exc.start}"
    if os.environ.get("TORL_TRACEBACK"):
        traceback.print_exc()
    with contextlib.suppress(OSError):  # stderr may be what is full
        print(f"torl: error: {error}", file=sys.stderr, flush=True)
    os._exit(1) if _is_stuck(sys.stdout) else sys.exit(1)


def _run() -> int:
    """The exit code, once all output is where it belongs."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _refuse_dashes(sys.argv[2:])
    code: int | str | None = 0
    try:
        app()
    except SystemExit as exc:
        code = exc.code
    sys.stdout.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def _in_words(exc: OSError) -> str:
    """What the system refused, about which file, and what to do about it."""
    where = f"{exc.filename}: " if exc.filename is not None else ""
    if exc.errno == errno.ENOSPC:
        return f"{where}no space is left on the device; free some and give the same command again"
    return f"{where}{exc.strerror or exc}"


def _is_stuck(stream: TextIO) -> bool:
    """Whether what it still holds cannot be written: Python would complain at exit."""
    try:
        stream.flush()
    except OSError:
        return True
    return False


if __name__ == "__main__":
    main()
