"""Pages that repeat what the code says: settings, metrics, messages. And the site made of them."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from docs_text import ROOT, flat, tokens_of

from tools import make_settings_doc
from torl_mega.algo.correction import mismatch
from torl_mega.config import Config
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.types import CollectedGroups

DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium")


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """Every text in the package, an ellipsis for each value in it; the launch scripts line by line."""
    found = []
    for file in (ROOT / "torl_mega").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\d]*[sdgr]", "…", node.value))
    for script in (ROOT / "launch").glob("*.sh"):
        found += re.sub(r"\$\{?\w+[^ ;,)\"]*", "…", script.read_text()).splitlines()
    return tuple(found)


def rows_of(page: str) -> list[list[str]]:
    """The code words of each table row's first cell."""
    rows, tokens = [], tokens_of(DOCS / page)
    for row, cell, inline in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if row.type == "tr_open" and cell.type == "td_open":
            rows.append([token.content for token in flat([inline]) if token.type == "code_inline"])
    return rows


def test_settings_are_those_of_the_config() -> None:
    page = (DOCS / "settings.md").read_text()
    assert make_settings_doc.page(page) == page, "run tools/make_settings_doc.py"
    leaves = [f"{name}.{leaf}" for name, field in Config.model_fields.items()
              if isinstance(section := field.annotation, type) and hasattr(section, "model_fields")
              for leaf in section.model_fields]  # fmt: skip
    assert len(leaves) > 140
    assert [leaf for leaf in leaves if page.count(f"| `{leaf}` |") != 1] == []


def test_a_settings_page_that_is_old_is_made_anew() -> None:
    page = (DOCS / "settings.md").read_text()
    old = page.replace("| `optim.lr` | number > 0 |", "| `optim.lr` | number |")
    assert old != page
    assert make_settings_doc.page(old) == page


def test_metrics_are_called_what_the_code_calls_them() -> None:
    named = {name for row in rows_of("watching.md") for name in row} - {"algo.kl_coef"}
    logged = {*rollout_metrics(CollectedGroups((), {}, 0.0), max_tool_calls=1), *mismatch([])}
    hidden = {name for name in logged if not name.startswith(("execution/", "abs_logprob_diff_"))} - named
    assert hidden == set(), "docs/watching.md does not name them"
    texts = texts_of_the_code()
    for name in named:
        written = re.sub(r"<\w+>", "…", name).removeprefix("sync/").removeprefix("abs_logprob_diff_")
        pattern = re.compile(rf"(?<![\w/]){re.escape(written)}(?!\w)")
        assert any(map(pattern.search, texts)), name


def test_messages_are_those_of_the_code() -> None:
    rows = rows_of("faults.md")
    lines = [row[0] for row in rows if row and " " in row[0]]
    names = [name for row in rows if row and " " not in row[0] for name in row]
    assert len(lines) > 50
    assert [line for line in lines if not is_said(line)] == []
    assert [name for name in names if not is_said(re.sub(r"^\w+(?=_(retry|lost)$)", "…", name))] == []


def is_said(line: str) -> bool:
    """The parts of a line stand in one text of the code, in their order."""
    return any(
        in_order([part for part in line.replace("\\`", "`").split("…") if part.strip()], text)
        for text in texts_of_the_code()
    )


def in_order(parts: list[str], text: str) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_a_message_that_nobody_says_is_found() -> None:
    assert is_said("step …: … = … is above guards.… = …")
    assert not is_said("step …: … = … is far above guards.… = …")
    assert not is_said("is above … = … guards.")


class Page(HTMLParser):
    """Counts elements, and keeps what the browser would fetch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "link") and values.get("rel") not in (
            "canonical",
            "next",
            "prev",
        ):
            self.fetched += [value for name in ("src", "href", "srcset") if (value := values.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a broken link or anchor fails."""
    out = tmp_path_factory.mktemp("site")
    command = [
        Path(sys.executable).with_name("mkdocs"),
        "build",
        "--strict",
        "--site-dir",
        out,
    ]  # --quiet would hide what --strict counts
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_fetches_nothing_and_leaves_nothing_out(site: Path) -> None:
    for page in DOCS.glob("**/*.md"):
        made = site / page.relative_to(DOCS).with_suffix(".html")
        parsed = Page()
        parsed.feed(made.read_text())
        outside = [url for url in parsed.fetched if re.match(r"(https?:)?//", url)]
        assert outside == [], made.name
        assert "mermaid" not in made.read_text()  # which the theme would fetch
    styles = "".join(file.read_text() for file in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*[\"']?(https?://[^\"')]*)", styles) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_search_works_from_the_disk(site: Path, tmp_path: Path) -> None:
    """Where no worker can be started and nothing be fetched."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=20000",
    ]
    page = f"file://{site}/plans/torl_7b.html?q=group_zero_signal_ratio"
    done = subprocess.run(
        [str(CHROMIUM), *options, "--enable-logging=stderr", "--dump-dom", page],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert re.search(r"md-search-result__meta\">\d+ matching documents", done.stdout), done.stderr[-2000:]
    assert "watching.html" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_the_site_shows_what_a_code_host_shows(site: Path) -> None:
    """Tables, lists and blocks come out alike, although the site's Markdown is not CommonMark."""
    names = {"table_open": "table", "list_item_open": "li", "tr_open": "tr", "fence": "pre", "code_block": "pre"}
    for page in DOCS.glob("*.md"):
        wanted = Counter(names[token.type] for token in tokens_of(page) if token.type in names)
        article = (
            (site / page.with_suffix(".html").name).read_text().partition("<article")[2].partition("</article>")[0]
        )
        parsed = Page()
        parsed.feed(article)
        assert {tag: parsed.elements[tag] for tag in set(names.values())} == {
            tag: wanted[tag] for tag in set(names.values())
        }, page.name
