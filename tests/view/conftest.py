"""One browser for the viewer's tests, and a run to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from recorded_run import make_run

from torl_mega.view.command import view


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    yield from chromium(tmp_path_factory.mktemp("chromium") / "profile")


@pytest.fixture
def browser(_chromium: Browser) -> Iterator[Browser]:
    """On a wide, light screen; the test fails when the page complains of anything."""
    _chromium.size(1400, 900)
    _chromium.dark(False)
    _chromium.complaints.clear()
    yield _chromium
    _chromium.eval("1")  # whatever was said until here has arrived
    assert _chromium.complaints == []


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="session")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of that run beside another one."""
    other = make_run(run.parent / "second", seed=5, scores=False)
    assert view(run, [other]) == 0
    return run / "view/index.html"
