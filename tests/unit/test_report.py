"""`torl report`: what a page and its tables say against the rows they were made of, read back from HTML and SVG."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import random
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torl_mega.errors import DataError
from torl_mega.run import paper
from torl_mega.view.report import Options, report

Row = dict[str, Any]


def _run(
    folder: Path, *, gain: float = 0.2, steps: int = 20, config: Row | None = None, more: Row | None = None
) -> Path:
    """A run folder as `torl train` leaves it: an evaluation before and after, `steps` steps, and a line that was cut off."""
    folder.mkdir(parents=True)
    rng = random.Random(str(gain))
    rows: list[Row] = [{"kind": "eval", "step": 0, "accuracy": 0.01, "code_ratio": 0.1, "arithmetic/accuracy": 0.01}]
    for s in range(steps):
        share = 1 - math.exp(-gain * s)
        row = {
            "accuracy": 0.2 + 0.7 * share,
            "code_ratio": 0.4 + 0.5 * share,
            "reward": 2 * share - 1 + rng.gauss(0, 0.1),
        }
        row |= {
            "grad_norm": 0.3 + 0.01 * s,
            "max_abs_logprob_diff": 1e-5 * 10 ** (s % 3),
            "response_length": 500 + 10 * s,
        }
        row |= {
            "rollout_s": 30.0 + s,
            "train_s": 14.0,
            "sync_s": 1.0,
            "step_s": 45.0 + s,
            "num_sampled_tokens": 1000 + s,
        }
        row |= {
            "execution/error": 0.25,
            "execution/timeout_wall": 0.0,
            "truncated_ratio": 0.0,
            "fault_rate": 0.0,
            "odd": s,
        }
        rows.append({"kind": "train", "step": s, **row, **(more or {})})
    rows.append({"kind": "eval", "step": steps, "accuracy": 0.85, "code_ratio": 1.0, "arithmetic/accuracy": 0.85})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"kind": "tr')
    (folder / "summary.json").write_text(
        json.dumps({"weight_sync": {"num_syncs": 21, "num_verified": 21}, "wall_s": {"total": 123.4}})
    )
    tree = {
        "name": folder.name,
        "seed": 1,
        "optim": {"lr": 1e-6, "betas": [0.9, 0.95]},
        "logging": {"tensorboard": True},
    }
    (folder / "config.json").write_text(json.dumps({"config": tree | (config or {})}))
    return folder


def _train_rows(run: Path) -> list[Row]:
    lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


@dataclass
class Chart:
    """A figure of the page, read back."""

    title: str
    svg: ET.Element
    numbers: list[list[str]] = field(default_factory=list)  # rows of the table below it, the head first

    def texts(self, kind: str) -> list[ET.Element]:
        return [e for e in self.svg.iter("text") if kind in (e.get("class") or "").split()]

    def y_axis(self) -> tuple[float, float]:
        """(value of y = 0, value a unit): fitted to the ticks, which stand 3.5 below their line."""
        ticks = [e for e in self.texts("tick") if e.get("text-anchor") == "end"]
        places, values = [float(e.get("y", "")) - 3.5 for e in ticks], [float(e.text or "") for e in ticks]
        slope, start = np.polyfit(places, values, 1)
        return start, slope

    def line(self, kind: str = "line") -> list[list[tuple[float, float]]]:
        """Each path of this class as (x, value)."""
        start, slope = self.y_axis()
        found = []
        for path in self.svg.iter("path"):
            if kind in (path.get("class") or "").split():
                pairs = [pair.split() for pair in (path.get("d") or "")[1:].split("L")]
                found.append([(float(x), start + slope * float(y)) for x, y in pairs])
        return found

    def read_outs(self) -> list[list[str]]:
        return [
            [t.strip() for t in group.itertext() if t.strip()]
            for group in self.svg.iter("g")
            if group.get("class") == "read"
        ]


class Page(html.parser.HTMLParser):
    """Tags, tables by heading, and links of a page."""

    def __init__(self, raw: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self.feed(raw)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[list[str]]:
        return next(t for t in self.tables if first in t[0])


def _charts(raw: str) -> dict[str, Chart]:
    found = {}
    for figure in re.findall(r"<figure>.*?</figure>", raw, re.S):
        title = re.search(r"<b>(.*?)</b>", figure)
        svg = re.search(r"<svg.*?</svg>", figure, re.S)
        assert title is not None
        assert svg is not None
        numbers = Page(figure).tables
        found[title[1]] = Chart(title[1], ET.fromstring(svg[0]), numbers[0] if numbers else [])
    return found


def _page(runs: Sequence[Path], tmp_path: Path, **options: Any) -> str:
    out = tmp_path / "report.html"
    assert report(runs, out, options=Options(**options)) == 0
    return out.read_text()


def test_a_chart_says_what_the_rows_say(tmp_path: Path) -> None:
    """The line, its label, the read-out and the table below agree with metrics.jsonl."""
    runs = [_run(tmp_path / "a", gain=0.2), _run(tmp_path / "b", gain=0.05)]
    charts = _charts(_page(runs, tmp_path))
    chart = charts["accuracy in training"]
    wanted = [[row["accuracy"] for row in _train_rows(run)] for run in runs]
    for line, values in zip(chart.line(), wanted, strict=True):
        assert [v for _, v in line] == pytest.approx(values, abs=2e-3)
        xs = np.diff([x for x, _ in line])
        assert xs == pytest.approx(xs[0], abs=0.11)  # steps are even
    labels = {(e.text or "").split()[0]: (e.text or "").split()[1] for e in chart.texts("label")}
    assert labels == {"A": f"{wanted[0][-1]:.3f}", "B": f"{wanted[1][-1]:.3f}"}
    assert chart.read_outs()[5] == ["step 5", f"A {wanted[0][5]:.3f}".rstrip("0"), f"B {wanted[1][5]:.3f}".rstrip("0")]
    assert chart.numbers[0] == ["step", "A", "B"]
    assert 8 <= len(chart.numbers) - 1 <= 12
    for step, *cells in chart.numbers[1:]:
        assert [float(c) for c in cells] == pytest.approx([w[int(step)] for w in wanted], abs=5e-4)
    circles = [e for e in chart.svg.iter("circle") if "mark" in (e.get("class") or "")]
    assert len(circles) == 4  # two evaluations a run
    assert "A at 20: 0.85" in ["".join(e.itertext()) for e in circles]
    assert "last values: A" in (chart.svg.get("aria-label") or "")


def test_charts_are_of_what_was_logged(tmp_path: Path) -> None:
    raw = _page([_run(tmp_path / "a")], tmp_path)
    assert set(_charts(raw)) == {
        "accuracy in training", "accuracy in evaluation", "reward", "code ratio", "response length (tokens)", "gradient norm",
        "largest |server − trainer| log-prob", "step (s)", "rollout (s)", "time in a step (s)", "A · time in a step (s)",
    }  # fmt: skip
    for still in (
        "Never moved: truncated 0.",
        "Never moved: training (s) 14, weight sync (s) 1.",
        "Never moved: trajectories lost 0.",
    ):
        assert still in raw
    other = Page(raw).table("metric, last step")
    assert ["odd", "19"] in other
    log = _charts(raw)["largest |server − trainer| log-prob"]
    assert [e.text for e in log.texts("tick") if e.get("text-anchor") == "end"] == ["1e-5", "1e-4", "1e-3"]


def test_a_mean_is_that_of_the_steps_before(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", steps=100)
    raw = _page([run], tmp_path)
    assert "means over the last 16 steps" in raw  # as the paper's figure 1
    chart = _charts(raw)["reward"]
    rewards = np.array([row["reward"] for row in _train_rows(run)])
    wanted = [rewards[max(0, i - 15) : i + 1].mean() for i in range(len(rewards))]
    (line,), (faint,) = chart.line(), chart.line("raw")
    assert [v for _, v in line] == pytest.approx(wanted, abs=0.01)
    assert [v for _, v in faint] == pytest.approx(rewards, abs=0.01)
    assert "not averaged" in _page([run], tmp_path, window=1)
    assert not _charts(_page([run], tmp_path, window=1))["reward"].line("raw")


def test_axes_count_what_came_before(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    rows = _train_rows(run)
    tokens = _charts(_page([run], tmp_path, axis="tokens"))["accuracy in training"].read_outs()
    spent = sum(row["num_sampled_tokens"] for row in rows[:3])
    assert tokens[3][0] == f"tokens {spent}"
    seconds = _charts(_page([run], tmp_path, axis="time"))["accuracy in training"]
    assert [e.text for e in seconds.texts("axis")] == ["minutes in steps, evaluations left out"]
    assert seconds.read_outs()[3][0] == f"minutes {sum(row['step_s'] for row in rows[:3]) / 60:.3g}"
    lacking = tmp_path / "b"
    lacking.mkdir()
    (lacking / "metrics.jsonl").write_text('{"kind": "train", "step": 0, "accuracy": 0.1}\n')
    with pytest.raises(DataError, match=r"--x tokens: b did not log num_sampled_tokens"):
        _page([run, lacking], tmp_path, axis="tokens")


def test_many_runs_are_told_apart(tmp_path: Path) -> None:
    runs = [_run(tmp_path / f"run{i}", gain=0.02 * (i + 1)) for i in range(20)]
    raw = _page(runs, tmp_path)
    chart = _charts(raw)["accuracy in training"]
    looks = [e.get("class") for e in chart.svg.iter("path") if "line" in (e.get("class") or "").split()]
    assert len(set(looks)) == 20
    labels = sorted(float(e.get("y", "")) for e in chart.texts("label"))
    assert len(labels) == 20
    assert min(np.diff(labels)) >= 11.9  # none lies on another
    assert labels[-1] <= float((chart.svg.get("viewBox") or "").split()[3])
    assert "run0, run1 and 18 more runs" in raw
    colours = {c: re.findall(rf"--c{c}: (#\w+)", raw) for c in range(8)}
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in colours.values())  # light and dark
    same = [tmp_path / "x/one", tmp_path / "y/one"]
    table = Page(_page([_run(f) for f in same], tmp_path)).table("steps")
    assert [row[1] for row in table[1:]] == [str(f) for f in same]  # two folders of one name


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path / "a"),
        _run(tmp_path / "b", config={"seed": 2, "optim": {"lr": 2e-6, "betas": [0.9, 0.95]}, "algo": {"new": "<i>"}}),
        _run(tmp_path / "c", config={"logging": {"tensorboard": False}}),
    ]
    (tmp_path / "c/config.json").unlink()
    raw = _page(runs, tmp_path)
    table = Page(raw).table("setting")
    assert table[1:] == [["seed", "1", "2", "–"], ["optim.lr", "1e-06", "2e-06", "–"], ["algo.new", "–", "<i>", "–"]]
    assert "No config was found for C." in raw


def test_the_papers_numbers_stand_beside_ours_and_are_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [round(paper.mean(paper.row("1.5b", m)), 1) for m in paper.TABLE_3["1.5b"]] == [35.9, 39.3, 48.5]
    assert [round(paper.mean(paper.row("7b", m)), 1) for m in paper.TABLE_3["7b"]] == [39.8, 47.4, 43.5, 43.7, 56.1]
    run = _run(tmp_path / "a")
    rows = [
        {"kind": "eval", "step": s, "accuracy": 0.3 + s / 100, "aime24/accuracy": 0.2 + s / 100, "amc23/accuracy": 0.5}
        for s in (0, 9)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    raw = _page([run], tmp_path, size="7b")
    chart = _charts(raw)["aime24, accuracy in evaluation"]
    assert [e.text for e in chart.texts("paper")] == ["ToRL-7B, Table 3 0.433"]
    start, slope = chart.y_axis()
    (path,) = (e for e in chart.svg.iter("path") if e.get("class") == "paper")
    assert start + slope * float((path.get("d") or "").split("H")[0].split()[1]) == pytest.approx(0.433, abs=1e-3)
    mean = _charts(raw)["accuracy in evaluation"]
    assert [e.text for e in mean.texts("paper")] == [f"ToRL-7B, mean of Table 3 {(0.433 + 0.75) / 2:.3f}".rstrip("0")]
    capsys.readouterr()
    report([run], tmp_path / "r.html", markdown=Path("-"))
    text = capsys.readouterr().out
    assert "| A a | 29.0 | – | – | – | 50.0 | 39.5 |" in text
    assert "| ToRL-7B (paper) | 43.3 | 30.0 | 82.2 | 49.9 | 75.0 | 56.1 |" in text
    assert "arXiv 2503.23383, Table 3" in text


def test_faults_tools_phases_and_versions(tmp_path: Path) -> None:
    run = _run(
        tmp_path / "a", more={"faults/sandbox_retry": 2, "faults/skipped_updates": 1.0, "tool/search/calls": 0.5}
    )
    (run / "versions.json").write_text(
        json.dumps([{"from_step": 0, "torch": "2.1", "chip": "x"}, {"from_step": 9, "torch": "2.2", "chip": "x"}])
    )
    raw = _page([run], tmp_path)
    page = Page(raw)
    assert page.table("trajectories lost")[1] == ["A", "a", "0.00%", "40", "20"]
    assert page.table("error")[1] == ["A", "a", "0.900", "0.250", "0.500"] or page.table("error")[1][-2:] == [
        "0.250",
        "0.500",
    ]
    versions = next(t for t in page.tables if ["chip", "x"] in t)
    assert ["torch", "2.1 → 2.2"] in versions
    bars = _charts(raw)["time in a step (s)"]
    assert bars.numbers == [["run", "rollout", "train", "sync", "step"], ["A", "39.5", "14", "1", "54.5"]]
    widths = [float(e.get("width", "")) for e in bars.svg.iter("rect")]
    assert widths == pytest.approx([sum(widths) * part / 54.5 for part in (39.5, 14, 1)], abs=0.1)
    area = _charts(raw)["A · time in a step (s)"]
    assert sum(1 for _ in area.svg.iter("polygon")) == 3


def test_links_lead_to_the_steps_trajectories(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "runs" / "javascript:a&b %"), _run(tmp_path / "runs" / "b")]
    (runs[0] / "view").mkdir()
    (runs[0] / "view/index.html").write_text("")
    out = tmp_path / "pages" / "r.html"
    report(runs, out)
    links = [a["href"] or "" for tag, a in Page(out.read_text()).tags if tag == "a"]
    away = {link for link in links if not link.startswith("#")}
    start = "../runs/javascript%3Aa%26b%20%25/view/index.html"
    assert start in away
    assert f"{start}#step=0" in away
    assert all(link.startswith(start) for link in away)  # no link to a page that is not there


def test_the_page_is_inert_and_repeats(tmp_path: Path) -> None:
    run = _run(
        tmp_path / "<script>$x^{ & 'run'\x1b", more={"tool/<img src=x onerror=alert(1)>/calls": 1.5, "reward/<b>": 0.1}
    )
    rows = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    odd = [{"kind": "train", "step": 20 + i, "accuracy": v} for i, v in enumerate([math.nan, "<b>", None, True, 1e400])]
    bad = [{"kind": "train", "step": "<b>"}, {"kind": "train"}, [1], "x"]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*rows, *map(json.dumps, [*odd, *bad])]))
    raw = _page([run, run], tmp_path)
    page = Page(raw)
    assert not {"script", "img", "iframe", "link"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") or name in ("src", "style") for _, a in page.tags for name in a)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", raw)
    assert not re.search(r"https?://|@import|url\(", raw)
    css = re.search(r"<style>(.*?)</style>", raw, re.S)
    assert css is not None
    digest = base64.b64encode(hashlib.sha256(css[1].encode()).digest()).decode()
    policy = next(a for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")["content"] or ""
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    report([run, run], tmp_path / "again.html", png=tmp_path / "a.png")
    report([run, run], tmp_path / "again2.html", png=tmp_path / "b.png")
    assert (tmp_path / "again.html").read_text() == (tmp_path / "again2.html").read_text() == raw
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_twenty_long_runs_are_quick_and_small(tmp_path: Path) -> None:
    runs = [_run(tmp_path / f"run{i}", gain=0.001 * (i + 1), steps=1000) for i in range(20)]
    began = time.process_time()
    raw = _page(runs, tmp_path, axis="time")
    assert time.process_time() - began < 10
    assert len(raw) < 3_000_000
    peaks = _charts(_page([_peak(tmp_path / "peak")], tmp_path))["reward"]
    assert max(v for _, v in peaks.line("raw")[0]) == pytest.approx(50, abs=1)  # thinned, but no peak is lost


def _peak(folder: Path) -> Path:
    """A run of 1,000 steps of which one is far off."""
    folder.mkdir()
    rows = [{"kind": "train", "step": s, "reward": 50.0 if s == 501 else s / 1000} for s in range(1000)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_what_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "a")
    tables = tmp_path / "docs" / "t.md"
    assert report([run], png=tmp_path / "docs/p.png", markdown=tables, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"html": str(run / "report.html"), "png": str(tmp_path / "docs/p.png"), "markdown": str(tables)}
    assert "| A | a | 20 | 0.010 | 0.850 | 1.000 |" in tables.read_text()
    hostile = _run(tmp_path / "x|y`<b>[z](q)")
    report([hostile], markdown=Path("-"))
    assert r"| A | x\|y\`&lt;b>\[z\](q) |" in capsys.readouterr().out


def test_wrong_calls_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics.jsonl is not there"):
        report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match=r"holds no rows"):
        report([tmp_path])
    with pytest.raises(DataError, match=r"needs a run folder"):
        report([])
    run = _run(tmp_path / "run")
    blocked = run / "metrics.jsonl" / "page"
    for wrong in ({"out": blocked}, {"png": blocked.with_suffix(".png")}, {"markdown": blocked}):
        with pytest.raises(DataError, match=r"page\S* cannot be written"):
            report([run], **wrong)
    with pytest.raises(DataError, match=r"does not end in .png"):
        report([run], png=tmp_path / "x.xyz")
