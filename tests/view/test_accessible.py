"""Every view of the page under axe-core: nothing serious, in light and dark, wide and on a phone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from browser import Browser

VIEWS = {
    "index": "#step=1",
    "filtered": "#step=1&answer=wrong&tool=error",
    "tokens": "#step=1&group=2&sample=1&token=3",
    "gap": "#step=1&group=2&sample=1&mode=gap",
    "advantage": "#step=1&group=2&sample=1&mode=advantage",
    "read": "#step=1&group=2&sample=1&mode=read",
    "evaluation": "#eval=step_00000&group=1",
    "attempts": "#step=all&view=attempts",
    "timeline": "#step=1&view=timeline",
    "steps": "#view=steps",
    "problem": "#problem=sums/3",
}


@pytest.fixture(scope="module")
def axe() -> str:
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or not found.submodule_search_locations:
        pytest.skip("axe-core is not installed: `pip install --no-deps --group axe`")
    return (Path(next(iter(found.submodule_search_locations))) / "axe.min.js").read_text()


def complaints(browser: Browser) -> list[str]:
    """What axe-core calls serious or critical, with the first place of each."""
    result = browser.eval("axe.run(document, {preload: false, resultTypes: ['violations']})")
    return [
        f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]} {v['nodes'][0]['failureSummary'][:300]}"
        for v in result["violations"]
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(
    ("phone", "dark"), [(False, False), (True, True)], ids=["wide and light", "a phone in the dark"]
)
def test_axe_finds_nothing_serious(browser: Browser, page: Path, axe: str, dark: bool, phone: bool) -> None:
    browser.dark(dark)
    browser.size(*((390, 844) if phone else (1400, 900)), phone=phone)
    browser.open(page)
    browser.eval(f"{axe}; 1")
    found = {}
    for name, address in VIEWS.items():
        browser.go(address)
        if "group" in address or "problem" in address:
            browser.wait("document.querySelector('.attempt-pane .text > *')")
        found[name] = complaints(browser)
    assert {name: said for name, said in found.items() if said} == {}


def test_axe_finds_what_is_wrong(browser: Browser, page: Path, axe: str) -> None:
    browser.open(page, "#step=1")
    browser.eval(f"{axe}; 1")
    browser.eval("document.querySelector('.sums').style.color = '#bbb'")
    browser.eval("document.querySelector('.where select').removeAttribute('aria-label')")
    assert {said.split(":")[0] for said in complaints(browser)} == {"color-contrast", "select-name"}
