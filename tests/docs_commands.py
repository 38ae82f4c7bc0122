"""What a test can do with each command of the docs.

    FAST       runs here in seconds: executed in `make test`
    SLOW       runs here, trains or renders: executed by `make test-slow`, page by page, in one folder
    CHECKED    cannot run here (GPUs, a cluster, downloads, hours) or names a placeholder: subcommand, options, settings, files
    OUTSIDE    other people's programs: nothing to check

A command in none of these is an error, so that a new one is looked at. `torl` commands are parsed as the program parses them, and
their overrides read against the config that they name.
"""

from __future__ import annotations

import ast
import re
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any

import typer.main
from docs_text import ROOT, Command

from torl_mega.cli import app
from torl_mega.config_file import load_config

PLACEHOLDER = re.compile(r"^(RUN\d?|CONF|DIR|NAME|JOB|T)\b|…|<\w+>|\.\.\.|[=/\[]NAME\b|NNN|\.\./|name=\w*…")
OUTSIDE_PROGRAMS = {
    "docker",
    "hf",
    "git",
    "mkdir",
    "cp",
    "source",
    "tail",
    "tensorboard",
    "grep",
    "curl",
    "enroot",
    "jq",
}
SECONDS = {"config", "plan"}  # subcommands that import no engine
RUNS_HERE = re.compile(
    r"conf/quickstart(_tools|_moe)?\.yaml|examples/\w+\.yaml|runs/(look|quickstart\w*|sampled|replayed)(/|$)"
)


class Kind(Enum):
    FAST = auto()
    SLOW = auto()
    CHECKED = auto()
    OUTSIDE = auto()


def kind_of(command: Command) -> Kind:
    """Raises ValueError for a command in no class, and for one that cannot be right."""
    program, words = command.words[0], command.words[1:]
    if program in OUTSIDE_PROGRAMS:
        return Kind.OUTSIDE
    if program == "torl":
        return _torl(command)
    if program == "make":
        _check(words and set(words) <= make_targets(), command, f"no such target of the Makefile: {words}")
    elif program == "python":
        _python(command)
    elif program == "sbatch" or program.startswith("launch/"):
        _slurm(command)
    else:
        raise ValueError(f"{command.where}: {command.text}: a program in no class; see tests/docs_commands.py")
    return Kind.CHECKED


def _torl(command: Command) -> Kind:
    words = command.words[1:]
    if any(PLACEHOLDER.search(word) for word in words):
        check_options(words, command)
        return Kind.CHECKED
    name, values = parsed(words, command)
    conf = values.get("conf")
    if conf is not None:
        load_config(ROOT / conf, values.get("overrides") or ())
    if name == "sandbox" or values.get("gpu") is True:
        return Kind.CHECKED
    if name in SECONDS:
        return Kind.FAST
    return Kind.SLOW if words == ("doctor",) or any(RUNS_HERE.search(word) for word in words) else Kind.CHECKED


def parsed(words: tuple[str, ...], command: Command) -> tuple[str, dict[str, Any]]:
    """(subcommand, its parameters), as the program itself reads the words."""
    try:
        group: Any = typer.main.get_command(app)
        sub = group.commands[words[0]]
        return words[0], dict(sub.make_context(words[0], list(words[1:])).params)
    except Exception as exc:
        raise ValueError(f"{command.where}: {command.text}: {exc!r}") from exc


def check_options(words: tuple[str, ...], command: Command) -> None:
    """The subcommand and every --option of a form such as `torl view RUN [--step N]`."""
    group: Any = typer.main.get_command(app)
    for name in words[0].split("|"):
        _check(name in group.commands, command, f"no subcommand {name}")
        known = {"--help", *(option for parameter in group.commands[name].params for option in parameter.opts)}
        asked = set(re.findall(r"--[a-z][\w-]*", " ".join(words[1:])))
        _check(asked <= known, command, f"torl {name} has no {', '.join(sorted(asked - known))}")


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M)) | {"mcore-next", "te"}


def _python(command: Command) -> None:
    words = command.words[1:]
    if words[0] == "-m":
        _check(words[1] == "pytest" or words[1].startswith("torl_mega."), command, "an unknown module")
        paths = [ROOT / word for word in words[2:] if word.startswith("tests/")]
        _check(all(path.exists() for path in paths), command, "a test that is not there")
        return
    tool = ROOT / words[0]
    _check(tool.is_file(), command, f"{words[0]} is not there")
    options = {word.strip("[]").partition("=")[0] for word in words[1:] if word.strip("[").startswith("--")}
    _check(options <= options_of(tool), command, f"{words[0]} has no {options - options_of(tool)}")


@cache
def options_of(tool: Path) -> set[str]:
    """The options that its argparse is given, there or in a module of ours that it imports."""
    nodes = list(ast.walk(ast.parse(tool.read_text())))
    modules = [node.module.replace(".", "/") for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    for file in (ROOT / f"{module}.py" for module in modules if module.startswith("torl_mega")):
        nodes += ast.walk(ast.parse(file.read_text())) if file.is_file() else []
    calls = (node for node in nodes if isinstance(node, ast.Call))
    named = (node.args for node in calls if getattr(node.func, "attr", "") == "add_argument")
    return {word.value for words in named for word in words if isinstance(word, ast.Constant)}


def _slurm(command: Command) -> None:
    """The launch file is there, and TORL_OVERRIDES are settings of its config."""
    files = [word for word in command.words if word.startswith("launch/")]
    _check(files and all((ROOT / file).is_file() for file in files), command, "a launch file that is not there")
    conf = command.environment.get("TORL_CONF")
    script = next((file for file in files if file.endswith(".slurm")), None)
    if script is not None:
        named = re.search(r"^torl_job (\S+)", (ROOT / script).read_text(), re.M)
        assert named
        load_config(ROOT / (conf or named[1]), command.environment.get("TORL_OVERRIDES", "").split())


def _check(holds: object, command: Command, what: str) -> None:
    if not holds:
        raise ValueError(f"{command.where}: {command.text}: {what}")
