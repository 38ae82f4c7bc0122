"""50,000 trajectories: how long the page takes to be written, to open and to filter, and what it holds meanwhile."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from browser import Browser
from recorded_run import make_run

from torl_mega.rollout.recorder import read_rows, step_path
from torl_mega.view.command import view

NUM, SIZE = 50_000, 16
OPEN_S, FILTER_MS = 3.0, 200.0


def big_step(path: Path, rows: list[dict[str, Any]], num: int, *, first: int = 0) -> None:
    """`num` trajectories in groups of 16, of which each has an id, a group and numbers of its own."""
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as out:
        for n in range(num):
            row = rows[(n * 7) % len(rows)]
            row |= {"group": n // SIZE, "problem_id": f"sums/{first + n // SIZE}", "sample_index": n % SIZE}
            row["advantage"] = (n % 5 - 2) / 2
            out.write(json.dumps(row).encode() + b"\n")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = make_run(tmp_path_factory.mktemp("rows") / "run", steps=1, problems=12)
    return list(read_rows(step_path(run / "trajectories", 0)))


def best(times: int, what: Callable[[], float]) -> float:
    """The least of some measurements: what the machine can do when nothing else disturbs it."""
    return min(what() for _ in range(times))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 25])
def test_fifty_thousand_trajectories(browser: Browser, rows: list[dict[str, Any]], tmp_path: Path, steps: int) -> None:
    run = make_run(tmp_path / "run", steps=1, problems=2, scores=False)
    for step in range(steps):
        big_step(step_path(run / "trajectories", step), rows, NUM // steps, first=step * 200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    assert view(run) == 0
    print(f"written in {time.perf_counter() - begun:.1f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"memory of the writer grew by {grown:.0f} MB")
    assert grown < 400
    page = run / "view/index.html"
    address = "#step=all" if steps > 1 else "#step=0"

    def opened() -> float:
        browser.call("Page.navigate", url="about:blank")
        begun = time.perf_counter()
        browser.call("Page.navigate", url=page.as_uri() + address)
        browser.wait("document.body && document.body.dataset.ready && document.querySelector('ol.virtual li')")
        return time.perf_counter() - begun

    seconds = best(3, opened)
    print(f"opened in {seconds:.2f} s")
    assert browser.text(".sums b") == "50\u202f000 attempts"
    assert browser.eval("document.querySelectorAll('*').length") < 3000  # only what can be seen is drawn

    def filtered(hash_: str) -> float:
        browser.go(address)
        browser.go(f"{address}&{hash_}")
        return float(browser.eval("torl.lastFilterMs"))

    for hash_ in (
        "answer=wrong",
        "answer=wrong&tool=timeout,error&advantage=negative",
        "view=attempts&calls=1&q=sums/1",
    ):
        ms = best(3, lambda hash_=hash_: filtered(hash_))
        print(f"{hash_}: {ms:.0f} ms")
        assert ms < FILTER_MS
        assert browser.texts("ol.virtual .title")
    assert seconds < OPEN_S
    browser.go(f"{address}&answer=wrong")
    browser.click("ol.virtual li a")
    browser.wait("document.querySelector('.tokens')")
    heap = browser.eval("performance.memory.usedJSHeapSize") / 2**20
    print(f"heap {heap:.0f} MB")
    assert heap < 300
