"""The viewer's page in a real Chromium, opened from a file: what a person clicks, types and reads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from recorded_run import MODEL, Maker, add_step, make_run

from torl_mega.data.tokenizer import Tokenizer
from torl_mega.rollout.recorder import read_groups, read_rows, step_path
from torl_mega.types import Group
from torl_mega.view.command import Options, view

PHONE = (390, 844)


def rows_of(run: Path, step: int) -> list[dict[str, Any]]:
    return list(read_rows(step_path(run / "trajectories", step)))


def shown_groups(browser: Browser) -> list[str]:
    return browser.texts("ol.virtual .title")


def test_the_index_puts_what_can_be_learned_from_first(browser: Browser, page: Path, run: Path) -> None:
    browser.open(page, "#step=1")
    assert browser.text(".sums b") == "48 attempts"
    rates = browser.texts("ol.virtual .rate")
    right = [int(rate.split("/")[0]) for rate in rates]
    assert right == [*sorted(right[:4]), 0, 8]  # mixed, failed, solved
    assert all(0 < r < 8 for r in right[:4])
    strips = browser.eval(
        "[...document.querySelectorAll('ol.virtual .strip')].map((s) => s.getAttribute('aria-label'))"
    )
    assert strips[-1] == "8 correct"
    assert strips[-2] == "8 wrong"
    ticks = browser.eval(
        "[...document.querySelectorAll('ol.virtual .strip')].map((s) => s.querySelectorAll('.tick.right').length)"
    )
    assert ticks == right
    assert browser.texts("ol.virtual .line:last-child > .dim") == ["", "", "", "", "zero signal", "zero signal"]


def test_filters_count_and_leave_no_empty_frames(browser: Browser, page: Path, run: Path) -> None:
    rows = rows_of(run, 1)
    browser.open(page, "#step=1")

    def counts() -> dict[str, int]:
        found = browser.eval(
            "Object.fromEntries([...document.querySelectorAll('.facet')]"
            ".map((b) => [b.dataset.facet, b.querySelector('.num').textContent]))"
        )
        return {name: int(number) for name, number in found.items()}

    def statuses(row: dict[str, Any]) -> set[str]:
        return {t["tool_call"]["status"] for t in row["turns"] if t["tool_call"]}

    def expected(chosen: list[dict[str, Any]]) -> dict[str, int]:
        signal = {
            g for g, rs in itertools.groupby(rows, lambda r: r["group"]) if len({r["reward"]["value"] for r in rs}) > 1
        }
        return {
            "answer:correct": sum(r["reward"]["correct"] for r in chosen),
            "answer:wrong": sum(not r["reward"]["correct"] for r in chosen),
            "signal:zero-signal": sum(r["group"] not in signal for r in chosen),
            "advantage:negative": sum(r["advantage"] < -1e-6 for r in chosen),
            "tool:not-called": sum(not statuses(r) for r in chosen),
            "tool:timeout": sum("timeout_wall" in statuses(r) for r in chosen),
            "calls:1": sum(bool(statuses(r)) for r in chosen),
            "end:out-of-budget": sum(r["stop_reason"] == "length" for r in chosen),
            "version:1-step-behind": sum(min(v for t in r["turns"] for v in t["policy_versions"]) == 0 for r in chosen),
        }

    wanted = expected(rows)
    assert {k: counts().get(k, 0) for k in wanted} == wanted
    browser.click('[data-facet="answer:wrong"]')
    browser.wait("location.hash.includes('answer=wrong') && document.querySelector('.facet[aria-pressed=true]')")
    wrong = [r for r in rows if not r["reward"]["correct"]]
    wanted = expected(wrong) | {
        "answer:correct": len(rows) - len(wrong)
    }  # of its own filter: what choosing it would show
    assert {k: counts().get(k, 0) for k in wanted} == wanted
    assert browser.text(".sums b") == f"{len(wrong)} of 48 attempts"
    assert len(shown_groups(browser)) == len({r["group"] for r in wrong}) == 5  # the solved one is gone
    browser.click('[data-facet="tool:timeout"]')
    browser.wait("document.querySelectorAll('.facet[aria-pressed=true]').length == 2")
    both = [r for r in wrong if "timeout_wall" in statuses(r)]
    assert browser.text(".sums b") == f"{len(both)} of 48 attempts"
    assert len(shown_groups(browser)) == len({r["group"] for r in both})
    assert browser.eval("document.activeElement.dataset.facet") == "tool:timeout"  # the keyboard stays where it was
    browser.open(page, "#step=1&answer=correct&advantage=negative")  # an address that leaves nothing
    assert browser.text(".scroll .nothing").startswith("No attempt passes these filters.")
    browser.click(".nothing a")
    browser.wait("document.querySelectorAll('ol.virtual li').length == 6")
    browser.open(page, "#step=1&q=sums/3")
    assert len(shown_groups(browser)) == 1


def test_a_group_folds_equal_answers_and_opens_attempts(browser: Browser, page: Path, run: Path) -> None:
    browser.open(page, "#step=1")
    rows = rows_of(run, 1)
    browser.click("ol.virtual li:nth-child(2) a")
    browser.wait("document.querySelector('.tokens')")
    group = int(browser.eval("new URLSearchParams(location.hash.slice(1)).get('group')"))
    members = [r for r in rows if r["group"] == group]
    assert browser.text(".tally .dim") == ", ".join(
        f"{n} {word}" for word, n in (("correct", sum(r["reward"]["correct"] for r in members)),
                                      ("wrong", sum(not r["reward"]["correct"] for r in members))) if n)  # fmt: skip
    browser.wait("document.querySelector('.problem h2 math')")  # the formula is set
    calls = [[t["tool_call"]["status"] for t in r["turns"] if t["tool_call"]] for r in members]
    folded = Counter(
        (r["reward"]["extracted"], bool(c) and {"ok"} == set(c), bool(c), r["stop_reason"])
        for r, c in zip(members, calls, strict=True)
    )
    often = sorted(n for n in folded.values() if n > 1)
    assert sorted(int(text[1:]) for text in browser.texts(".often")) == often
    assert len(browser.texts(".folds > *")) == len(folded)
    if often:
        browser.click(".fold .first button")
        assert browser.eval("document.querySelectorAll('.fold .rest:not([hidden]) a').length") in often
    browser.click(".strip a:nth-child(3)")
    browser.wait("location.hash.includes('sample=2') && document.querySelector('.tokens')")


def test_every_token_mode_and_the_numbers_of_a_token(browser: Browser, page: Path, run: Path) -> None:
    row = next(r for r in rows_of(run, 1) if r["group"] == 2 and r["sample_index"] == 1)
    tokenizer = Tokenizer(MODEL)
    browser.open(page, "#step=1&group=2&sample=1")
    browser.wait("document.querySelector('.tokens')")
    ids = [i for t in row["turns"] for i in (*t["token_ids"], *t["observation_ids"])]
    assert browser.text(".tokens") == tokenizer.decode(ids)
    sampled = browser.eval("document.querySelectorAll('.tokens .sampled').length")
    assert sampled == sum(len(t["token_ids"]) for t in row["turns"])
    first = row["turns"][0]
    limits = (0.9, 0.5, 0.2, 0.05, 0.01)
    shades = [sum(2.718281828459045**x < limit for limit in limits) for x in first["logprobs"]]
    told = browser.eval("[...document.querySelectorAll('.tokens .sampled')].map((s) => s.className)")
    assert [int(re.search(r" s(\d)", name)[1]) for name in told[: len(shades)]] == shades  # type: ignore[index]
    classes = {
        "gap": " m2",
        "entropy": " e2",
        "advantage": "g" if row["advantage"] > 0 else "r",
        "mask": "trained",
        "version": "v1",
    }
    for mode, name in classes.items():
        browser.click(f".modes input[value={mode}] + span")
        browser.wait(f"location.hash.includes('mode={mode}')")
        assert name in browser.eval("document.querySelector('.tokens .sampled').className"), mode
    browser.click(".tokens .sampled[data-i='3']")
    panel = dict(zip(browser.texts(".panel dt"), browser.texts(".panel dd"), strict=True))
    assert panel["token"] == str(first["token_ids"][3])
    assert panel["log-prob"] == f"{first['logprobs'][3]:.4f}".replace("-", "−")
    assert panel["server − trainer"] == "+0.0500"
    assert panel["entropy"] == "0.750 nats"
    assert panel["trained on"] == "yes"
    assert panel["weights"] == "1"
    browser.click(".tokens .inserted")
    assert (
        dict(zip(browser.texts(".panel dt"), browser.texts(".panel dd"), strict=True))["trained on"]
        == "no, it was inserted"
    )
    browser.eval("document.querySelector('.tokens').focus()")
    browser.press("End")
    assert browser.text(".panel dd") == str(len(ids) - 1)  # counted over sampled and inserted ones


def test_tokens_by_keyboard_and_touch(browser: Browser, page: Path, run: Path) -> None:
    browser.open(page, "#step=1&group=2&sample=1")
    browser.wait("document.querySelector('.tokens')")
    browser.eval("document.querySelector('.tokens').focus()")
    for key, position in (
        ("ArrowRight", "0"),
        ("ArrowRight", "1"),
        ("ArrowRight", "2"),
        ("ArrowLeft", "1"),
        ("Home", "0"),
    ):
        browser.press(key)
        assert browser.text(".panel dd") == position, key
    browser.press("ArrowDown")
    first, chosen = browser.eval(
        "[document.querySelector('.tokens .t'), document.querySelector('.t.chosen')].map((n) => n.getClientRects()[0].top)"
    )
    assert chosen > first
    browser.press("n")
    low = browser.eval("document.querySelector('.t.chosen').className")
    assert re.search(r"s[345]", low)
    assert "log-prob" in browser.text("#live")
    browser.size(*PHONE, phone=True)
    browser.open(page, "#step=1&group=2&sample=1")
    browser.wait("document.querySelector('.tokens')")
    browser.tap(".tokens .t[data-i='5']")
    browser.wait("document.querySelector('.panel dd')?.textContent === '5'")


def test_a_permalink_leads_to_an_attempt_and_a_token(browser: Browser, page: Path) -> None:
    browser.open(page, "#step=0&group=3&sample=2&token=7&mode=entropy")
    browser.wait("document.querySelector('.t.chosen')")
    assert browser.text(".panel dd") == "7"
    assert browser.eval("document.querySelector('.modes input:checked').value") == "entropy"
    assert browser.eval("document.querySelector('.where select').selectedOptions[0].textContent") == "step 0"
    browser.press("Tab")
    address = browser.eval("location.href")
    browser.open(page, "#" + address.split("#")[1])
    browser.wait("document.querySelector('.t.chosen')")
    assert browser.eval("location.href") == address
    browser.open(page, "#step=99")
    assert browser.text(".note") == "This run has no such step."
    browser.open(page, "#step=0&group=99")
    assert "no problem number 99" in browser.text(".detail")


def test_from_step_to_step_and_over_all_of_them(browser: Browser, page: Path) -> None:
    browser.open(page, "#step=1")
    browser.click(".where .arrow:last-child")
    browser.wait("document.title.includes('step 2')")
    assert browser.eval("document.querySelector('.where .arrow:last-child').getAttribute('aria-disabled')") == "true"
    browser.click(".where .arrow")
    browser.wait("document.title.includes('step 1')")
    browser.open(page, "#step=all")
    assert browser.text(".sums b") == "144 attempts"
    assert browser.eval("document.querySelector('ol.virtual li').getAttribute('aria-setsize')") == "18"
    browser.open(page, "#view=steps")
    table = browser.texts("tbody th")
    assert table == ["step 0", "step 1", "step 2", "evaluation after 0 steps"]
    browser.click("tbody tr:nth-child(2) a")
    browser.wait("document.title.includes('step 1')")
    browser.open(page, "#step=1&view=attempts&sort=longest")
    lengths = [int(re.search(r"(\d+) tok", text)[1]) for text in browser.texts("ol.virtual .row")]  # type: ignore[index]
    assert lengths == sorted(lengths, reverse=True)


def test_one_problem_in_other_steps_and_in_another_run(browser: Browser, page: Path) -> None:
    browser.open(page, "#step=1&group=4")
    browser.wait("document.querySelector('.tokens')")
    browser.click("nav.steps a:nth-of-type(4)")
    browser.wait("document.querySelectorAll('.side .tokens').length == 2")
    names = browser.eval("[...document.querySelectorAll('.side select')].map((s) => s.selectedOptions[0].textContent)")
    assert names == ["first", "second"]
    assert browser.texts(".side:first-child .when") == ["step 0", "step 1", "step 2", "evaluation after 0 steps"]
    before = browser.text(".side:last-child .tokens")
    browser.click(".side:first-child .meeting:nth-child(2) .strip a:nth-child(3)")
    browser.wait("document.querySelector('.side:first-child > .dim')?.textContent === 'step 1, sample 2'")
    browser.wait("document.querySelectorAll('.side .tokens').length == 2")
    assert "step 1, sample 2" in browser.texts(".side:first-child > .dim")
    assert browser.text(".side:last-child .tokens") == before
    browser.open(page, "#problem=nothing")
    assert "No step holds a problem named nothing" in browser.text(".note")


def test_an_evaluation_can_be_read(browser: Browser, page: Path) -> None:
    browser.open(page, "#eval=step_00000&group=1")
    browser.wait("document.querySelector('.reading')")
    assert browser.eval("document.querySelector('.modes input[value=read]').checked")
    assert browser.text(".modes > .dim") == "not recorded: log-prob, server − trainer, entropy, advantage, weights"
    assert browser.texts(".modes label") == ["to read", "mask"]
    assert browser.text(".reading .program .hl-keyword") == "def"
    assert browser.text(".reading .output").strip() == "2"
    assert browser.text(".reading .formula math")
    browser.click(".modes input[value=mask] + span")
    browser.wait("document.querySelector('.tokens .inserted')")


def test_the_timeline_of_a_step(browser: Browser, page: Path, run: Path) -> None:
    browser.open(page, "#step=1&view=timeline&order=longest")
    rows = rows_of(run, 1)
    longest = max(rows, key=lambda r: sum(r["times"][1:]))
    label = browser.eval("document.querySelector('ol.virtual a.bar').getAttribute('aria-label')")
    assert label.startswith(f"{longest['problem_id']}, sample {longest['sample_index']}, ")
    assert ": generate " in label
    assert browser.eval("document.querySelectorAll('ol.virtual li:first-child .seg').length") >= 3
    assert "rollout 2.0 s" in browser.text(".legend")
    browser.click("ol.virtual a.bar")
    browser.wait("document.querySelector('.tokens')")
    browser.open(page, "#eval=step_00000&view=timeline")
    assert browser.text(".page .note") == "When these attempts ran was not recorded."


def test_damage_is_shown_beside_what_can_be_read(browser: Browser, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("view"))
    cut = step_path(copy / "trajectories", 1)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert view(copy) == 0
    browser.open(copy / "view/index.html")
    browser.click(".top .chip.bad")
    browser.wait("document.querySelector('.page .note')")
    assert "step_00001.jsonl.zst: ends early: it was cut off" in browser.text(".page .note")
    browser.go("#step=1")
    assert browser.text("details.note summary") == "1 fault in this file; what can be read is shown"
    (copy / "view/data/run/step_00002.000.js").unlink()
    browser.go("#step=2&group=0")
    browser.wait("document.querySelector('.attempt-pane .note')")
    assert "step_00002.000.js" in browser.text(".attempt-pane .note")
    browser.eval("1")
    browser.complaints.clear()  # Chromium's own line about the file that is gone


HOSTILE = [
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "</span></pre></script><script>window.hit=1</script>",
    "<svg/onload=window.hit=1>",
    '"><iframe srcdoc="<script>parent.hit=1</script>">',
    "javascript:window.hit=1",
    "$\\href{javascript:window.hit=1}{x}$ $\\htmlData{a=b}{x}$ $\\includegraphics{http://x/y.png}$ $\\url{javascript:hit=1}$",
    "$\\def\\a{\\a\\a}\\a$ $\\rule{99999em}{99999em}$ $" + "{" * 3000 + "$",
    "```python\n<b onmouseover=window.hit=1>'''\n</code><script>window.hit=1</script>\n```\n",
    "__proto__ constructor {{7*7}} ${window.hit=1} \u2028 \u2029 &lt;b&gt; \x1b[31m \u202e \x00",
    "A" * 50_000,
]


@pytest.mark.parametrize("out", ["view", "page.html"])
def test_hostile_text_stays_text(browser: Browser, tmp_path: Path, out: str) -> None:
    run = make_run(tmp_path / "run", steps=1, problems=3)
    maker = Maker(Tokenizer(MODEL), random.Random(1))
    group = maker.group(1, 0, len(HOSTILE), 2)
    everything = "\n".join(HOSTILE)
    problem = dataclasses.replace(
        group.prompt.problem, problem=everything, answer=everything, problem_id=HOSTILE[4], source=HOSTILE[1]
    )
    prompt = dataclasses.replace(group.prompt, problem=problem, token_ids=maker.tokenizer.encode(everything))
    trajectories = tuple(
        dataclasses.replace(t, prompt=prompt, turns=(*t.turns, maker.turn(text, 0)))
        for t, text in zip(group.trajectories, HOSTILE, strict=True)
    )
    rewards = tuple(dataclasses.replace(r, extracted=text) for r, text in zip(group.rewards, HOSTILE, strict=True))
    add_step(run, 1, [Group(prompt, trajectories, rewards)], scores=False)
    assert view(run, (), Options(out=tmp_path / out)) == 0
    path = tmp_path / out if out.endswith("html") else tmp_path / out / "index.html"
    browser.open(path, "#step=1")
    elements = set()
    for sample in range(len(HOSTILE)) if out == "view" else (0, 6, 9):
        for mode in ("read", "logprob"):
            browser.go(f"#step=1&group=0&sample={sample}&mode={mode}")
            browser.wait("document.querySelector('.tokens, .reading')")
            elements |= set(
                browser.eval("[...new Set([...document.querySelectorAll('#app *')].map((n) => n.localName))]")
            )
            assert not browser.texts("#app [src], #app [style*=url], #app [onerror], #app iframe")
            links = browser.eval("[...document.querySelectorAll('#app [href]')].map((a) => a.getAttribute('href'))")
            assert all(link.startswith("#") for link in links)
            boxes = "[document.documentElement, ...document.querySelectorAll('.detail, .tokens, .prose, .problem, .facts, .folds')]"
            wide = browser.eval(f"{boxes}.filter((n) => n.scrollWidth > n.clientWidth + 1).map((n) => n.className)")
            assert wide == [], (sample, mode)  # nothing runs out of its frame
    browser.go(f"#problem={HOSTILE[4]}".replace("%", "%25").replace("<", "%3C").replace(">", "%3E").replace('"', "%22"))
    assert browser.eval("window.hit") is None
    assert not elements & {"script", "img", "svg", "iframe", "b ", "object", "embed", "form"}
    assert browser.eval("Object.prototype.toString.call({}) === '[object Object]' && ({}).a === undefined")


def test_one_file_has_everything_in_it(browser: Browser, run: Path, tmp_path: Path) -> None:
    assert view(run, (), Options(step=1, limit=20, out=tmp_path / "page.html")) == 0
    browser.open(tmp_path / "page.html", "#group=0&mode=read")
    browser.wait("document.querySelector('.reading .program .hl-keyword')")
    assert browser.text(".sums").startswith("20 attempts (48 were recorded)")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_on_a_phone_and_in_the_dark(browser: Browser, page: Path) -> None:
    browser.size(*PHONE, phone=True)
    browser.dark(True)
    for address in ("#step=1", "#step=1&group=2&sample=1", "#view=steps", "#step=1&view=timeline", "#problem=sums/3"):
        browser.open(page, address)
        assert browser.eval("document.documentElement.scrollWidth <= innerWidth"), address
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    browser.open(page, "#step=1")
    assert browser.eval("getComputedStyle(document.querySelector('.detail')).display") == "none"
    browser.tap("ol.virtual li a")
    browser.wait("document.querySelector('.tokens')")
    assert browser.eval("getComputedStyle(document.querySelector('.list')).display") == "none"
    browser.tap("a.back")
    browser.wait("getComputedStyle(document.querySelector('.list')).display !== 'none'")
    assert not browser.eval("document.querySelector('details.filters').open")
    assert json.loads(
        browser.eval("JSON.stringify([...document.querySelectorAll('.views a')].map((a) => a.offsetHeight >= 24))")
    )


def test_what_is_not_looked_at_is_let_go(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=14, problems=2, size=2, scores=False)
    assert view(run) == 0
    browser.open(run / "view/index.html")
    for step in range(14):
        browser.go(f"#step={step}&group=0")
        browser.wait("document.querySelector('.tokens')")
    assert browser.eval("torl.heldChunks()") <= 12
    assert browser.eval("torl.stash.size") == 0
    assert len(read_groups(step_path(run / "trajectories", 0))) == 2
