"""What mkdocs is told about this repository while it builds the site (`hooks` in mkdocs.yml).

A page of docs/ that the navigation does not name comes last, under "More", and one that it names and that is not there is left
out. A link out of docs/ (`../examples/own_tool.py`) works where the markdown is read on a code host; the site, which holds docs/
alone, shows its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BY_FILE = re.compile(r"\[(\w+\.md)\]\((\1(?:#[\w-]+)?)\)")
OUTSIDE = re.compile(r"(?<!!)\[([^\]\n]+)\]\(\.\./[^)\s]+\)")
Entry = str | dict[str, Any]


def on_config(config: Any) -> Any:
    docs = Path(config["docs_dir"])
    nav = list(present(config["nav"], docs))
    named = set(pages_of(nav))
    left = sorted(path.name for path in docs.glob("*.md") if path.name not in named)
    config["nav"] = [*nav, {"More": left}] if left else nav
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # its own name alone
    docs = Path(config["docs_dir"]) / Path(page.file.src_path).parent
    markdown = BY_FILE.sub(lambda link: f"[{title_of(docs / link[1])}]({link[2]})", markdown)
    return OUTSIDE.sub(lambda link: link[1] if "`" in link[1] else f"`{link[1]}`", markdown)


def title_of(page: Path) -> str:
    """Its first heading, or its name where the page is not there (mkdocs then says so)."""
    found = re.search(r"^# (.+)$", page.read_text(), re.M) if page.is_file() else None
    return found[1] if found else page.name


def present(nav: list[Entry], docs: Path) -> Iterator[Entry]:
    """The entries whose page is there, in their order."""
    for entry in nav:
        if isinstance(entry, str):
            if (docs / entry).is_file():
                yield entry
            continue
        for title, inside in entry.items():
            if isinstance(inside, list):
                yield {title: list(present(inside, docs))}
            elif (docs / inside).is_file():
                yield {title: inside}


def pages_of(nav: list[Entry]) -> Iterator[str]:
    for entry in nav:
        for inside in entry.values() if isinstance(entry, Mapping) else (entry,):
            yield from pages_of(inside) if isinstance(inside, list) else (inside,)
