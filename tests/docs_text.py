"""The docs as a test reads them: blocks, commands, links, headings. Parsed as CommonMark with tables, as a code host does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("docs/first_run.md", "README.md", "AGENTS.md", "CONTRIBUTING.md")]
PAGES += sorted(set((ROOT / "docs").glob("*.md")) - set(PAGES))
STARTS = re.compile(
    r"([A-Z_]+=\S+ )*(torl |make |python t|sbatch |launch/\w+\.sh |\.venv/bin/)"
)  # in blocks of no language
ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Command:
    """One command of a page: `FOO=1 torl train conf/x.yaml` has the environment FOO=1."""

    where: str  # page:line
    text: str
    environment: dict[str, str]
    words: tuple[str, ...]


@cache
def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from flat(token.children or [])


def commands_of(page: Path) -> Iterator[Command]:
    """Every command in a block of a page: all lines of ```bash, and lines elsewhere that begin like one of ours."""
    for token in tokens_of(page):
        if token.type not in ("fence", "code_block") or token.info not in ("", "bash"):
            continue
        at = (token.map or [0])[0] + (2 if token.type == "fence" else 1)
        for offset, line in _lines(token.content):
            if token.info == "bash" or STARTS.match(line.strip()):
                yield from split(line.strip(), f"{page.relative_to(ROOT)}:{at + offset}")


def _lines(content: str) -> Iterator[tuple[int, str]]:
    """Lines with those that a backslash continues, and their numbers from 0."""
    pending, start = "", 0
    for number, line in enumerate(content.splitlines()):
        start = start if pending else number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
        elif pending.strip():
            yield start, pending
            pending = ""
        else:
            pending = ""


def split(line: str, where: str) -> Iterator[Command]:
    """The commands of a line: `a && b` and `a | b` are two. What follows # is a comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set("&|;"):
            words.append(word)
        elif words:
            environment = {}
            while words and ASSIGNMENT.match(words[0]):
                name, _, environment[name] = words.pop(0).partition("=")
            yield Command(where, line, environment, tuple(word.removeprefix(".venv/bin/") for word in words))
            words = []


def inline_code(page: Path) -> Iterator[str]:
    return (token.content for token in flat(tokens_of(page)) if token.type == "code_inline")


def links_of(page: Path) -> Iterator[str]:
    for token in flat(tokens_of(page)):
        target = token.attrGet("href" if token.type == "link_open" else "src")
        if token.type in ("link_open", "image") and target:
            yield str(target)


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as code hosts make them: lower case, punctuation out, spaces to hyphens."""
    tokens = tokens_of(page)
    headings = [after for token, after in pairwise(tokens) if token.type == "heading_open"]
    texts = ["".join(child.content for child in heading.children or []) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}
