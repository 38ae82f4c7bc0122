"""Brings a page of `torl view` up to date: sets that are new or changed, then the manifest, so that the page works at every moment.

Contract: incremental; where many sets are to be written, the manifest follows every few seconds, and an interruption leaves a
page of what was written until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torl_mega.view import site
from torl_mega.view.chunks import script
from torl_mega.view.sets import Source, eval_sources, step_sources

PUBLISH_S = 3.0


@dataclass(frozen=True, slots=True)
class Part:
    """One run of the page."""

    run: site.Shown
    every: Sequence[Source]
    wanted: Sequence[Source]  # that are brought up to date
    ledger: dict[str, dict[str, Any]]


def update(
    target: Path,
    runs: Sequence[site.Shown],
    *,
    step: int | None = None,
    limit: int | None = None,
    follow: bool = False,
    read: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Mapping[str, Mapping[str, Any]]:
    """Writes the page in `target` and returns the summaries of the first run's sets. `step`: of the first run that step alone.
    `read` False: only the page, with what was written before. `tell` hears every few seconds how far it is."""
    site.write_page(target)
    parts = [_part(target, run, step if not number else None) for number, run in enumerate(runs)]
    published = time.monotonic()

    def publish() -> None:
        nonlocal published
        opened = next((s.name for s in reversed(parts[0].wanted) if s.name in parts[0].ledger), "")
        about = site.manifest([(p.run, p.every, p.ledger) for p in parts], open_at=opened, follow=follow)
        site.write_new(target / "data" / "manifest.js", script("manifest", about))
        published = time.monotonic()

    def wrote(progress: str) -> None:
        if time.monotonic() - published > PUBLISH_S:
            tell(progress)
            publish()

    for part in parts if read else []:
        site.write_sets(target, part.run, part.wanted, part.ledger, limit=limit, wrote=wrote)
    publish()
    return parts[0].ledger


def _part(target: Path, run: site.Shown, step: int | None) -> Part:
    steps, evaluations = step_sources(run.folder), eval_sources(run.folder)
    wanted = [*evaluations, *steps] if step is None else [s for s in steps if s.step == step]
    return Part(run, [*steps, *evaluations], wanted, site.ledger_of(target, run))
