"""Links, anchors, pictures and files that the docs name are there, in the markdown as it lies in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from docs_text import PAGES, ROOT, anchors_of, inline_code, links_of

PLANS = sorted((ROOT / "docs/plans").glob("*.md"))
FILE = re.compile(
    r"(?<![\w/.<*])(?:conf|docs|examples|launch|tests|tools|torl_mega)/[\w./-]*\w\.(?:md|py|yaml|slurm|sh|png|jsonl)\b"
)
MADE_BY_THE_READER = {"launch/site.env"}


@pytest.mark.parametrize("page", [*PAGES, *PLANS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    named = {name for code in inline_code(page) for name in FILE.findall(code)} - MADE_BY_THE_READER
    assert [
        name for name in sorted(named) if not any((root / name).exists() for root in (ROOT, ROOT / "torl_mega"))
    ] == []
