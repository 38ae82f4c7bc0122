"""Every command of the docs is in a class of `docs_commands`; those that run in seconds are run, and outputs shown are compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from docs_commands import Kind, check_options, kind_of, make_targets, options_of
from docs_text import PAGES, ROOT, Command, commands_of, inline_code, split, tokens_of

BIN = Path(sys.executable).parent
OUTPUT = re.compile(r"<!-- output of: (.+) -->")  # before the block that shows it
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_every_command_is_one_that_exists(page: Path) -> None:
    for command in commands_of(page):
        kind_of(command)


def test_commands_are_found() -> None:
    kinds = [kind_of(command) for page in PAGES for command in commands_of(page)]
    assert len(kinds) > 80
    assert min(kinds.count(kind) for kind in Kind) >= 6


@pytest.mark.parametrize(
    "line",
    [
        "torl trian conf/quickstart.yaml",
        "torl train conf/quickstart.yaml --dryrun",
        "torl view RUN --steps 3",
        "python tools/bench_nothing.py",
        "python tools/grade.py --colour RUN",
        "make quickstrat",
        "sbatch launch/torl_8b.slurm",
        "rm -rf runs",
    ],
)
def test_what_cannot_be_right_is_found(line: str) -> None:
    with pytest.raises(ValueError, match="page:1"):
        [kind_of(command) for command in split(line, "page:1")]


def test_a_setting_that_does_not_exist_is_found() -> None:
    for line in (
        "torl train conf/quickstart.yaml optim.lrr=1",
        "TORL_OVERRIDES=optim.lrr=1 sbatch launch/torl_7b.slurm",
    ):
        with pytest.raises(Exception, match="is not a setting; did you mean"):
            [kind_of(command) for command in split(line, "page:1")]


@pages
def test_commands_in_sentences_exist(page: Path) -> None:
    for code in inline_code(page):
        words = tuple(code.removeprefix(".venv/bin/").split())
        command = Command(str(page.relative_to(ROOT)), code, {}, words)
        if words[0] == "torl" and len(words) > 1 and words[1][0] not in "-.=<":
            sub = words[1:] if words[1] != "sandbox" else ("sandbox",)
            check_options(sub, command)
        elif words[0] == "make" and len(words) == 2:
            assert words[1] in make_targets(), (page.name, code)
        elif words[0] == "python" and len(words) > 1 and words[1].startswith("tools/"):
            options = set(re.findall(r"--[a-z][\w-]*", code))
            assert options <= options_of(ROOT / words[1]), (page.name, code)


@cache
def run(words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """As a reader would, with a terminal wide enough that nothing is folded."""
    environment = {**os.environ, "COLUMNS": "2000", "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def shown_outputs() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(where, command, what the page shows of its output)."""
    for page in PAGES:
        tokens = tokens_of(page)
        for comment, block in pairwise(tokens):
            if comment.type == "html_block" and block.type == "fence" and (said := OUTPUT.match(comment.content)):
                (command,) = split(said[1], page.name)
                assert kind_of(command) is Kind.FAST
                yield page.name, command.words, block.content


def test_what_runs_in_seconds_runs() -> None:
    commands = {command.words for page in PAGES for command in commands_of(page) if kind_of(command) is Kind.FAST}
    commands |= {words for _, words, _ in shown_outputs()}
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, sorted(commands)))
    assert [(each.args, each.stderr[-500:]) for each in done if each.returncode] == []


def test_outputs_are_those_of_the_commands() -> None:
    """Line by line and in order; an ellipsis stands for anything, alone on a line for any lines."""
    outputs = list(shown_outputs())
    assert len(outputs) >= 2
    for where, words, shown in outputs:
        left = iter(line.rstrip() for line in run(words).stdout.splitlines())
        for line in filter(str.strip, shown.splitlines()):
            pattern = re.compile(".*".join(re.escape(part.strip()) for part in line.rstrip().split("…")) + r"$")
            assert any(pattern.search(printed) for printed in left), (where, line)
