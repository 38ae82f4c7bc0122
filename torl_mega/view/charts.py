"""Charts as SVG inside a page: lines with their values, and stacked bars.

Contract: text in, text out; every string that comes from a run is escaped here. Nothing but classes of report.css.j2 gives a
colour, so that a page is dark where its reader is. The same numbers give the same bytes. Values can be read without a script:
the last one stands at each line's end, a column under the pointer or the finger shows all lines there, and the page
writes the same columns as a table (`columns`). Lines of many points are thinned to what a chart can show.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
NUM_COLOURS, NUM_DASHES = 8, 3
WIDTH, HEIGHT, TOP, BOTTOM, LEFT = 400, 220, 10, 34, 46
LABEL_GAP = 12.0  # between direct labels
LINE_POINTS, RAW_BUCKETS = 160, 80
READ_WIDTH = 96


@dataclass(frozen=True, slots=True)
class Line:
    """One run in a chart. `drawn` is the line, `raw` what it was averaged from (or nothing), `marks` are open circles."""

    index: int  # of the run: decides colour and dash
    key: str
    drawn: Points
    raw: Points = ()
    marks: Points = ()


@dataclass(frozen=True, slots=True)
class XAxis:
    label: str
    word: str  # before a place on it: step 5


@dataclass(frozen=True, slots=True)
class Reference:
    """A horizontal line that no run made."""

    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Frame:
    """Where values lie on the canvas."""

    low_x: float
    high_x: float
    low: float
    high: float
    right: float
    bottom: float
    log: bool

    def x(self, value: float) -> float:
        return LEFT + (self.right - LEFT) * (value - self.low_x) / (self.high_x - self.low_x)

    def y(self, value: float) -> float:
        if self.log:
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(max(value, 1e-300))
        else:
            low, high = self.low, self.high
        return self.bottom - (self.bottom - TOP) * (value - low) / (high - low)


def look(index: int) -> str:
    """The classes of a run's colour and dash; 24 runs have one of their own."""
    return f"c{index % NUM_COLOURS} d{index // NUM_COLOURS % NUM_DASHES}"


def short(value: float) -> str:
    """About three digits that count: 0.571, 12.3k, 3.8e-06."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.1e}"
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if size < 0.9995 * limit:
            return _three(value / divisor) + unit
    return f"{value:.2e}"


def place(x: float) -> str:
    """A place on the x axis: whole numbers are written out."""
    return f"{x:.0f}" if x == round(x) and abs(x) < 1e4 else short(x)


def _three(value: float) -> str:
    digits = max(0, 2 - max(0, math.floor(math.log10(abs(value))))) if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def columns(lines: Sequence[Line], most: int) -> list[float]:
    """At most `most` places on the x axis, evenly over all the points there are, first and last among them."""
    xs = sorted({x for line in lines for x, _ in line.drawn or line.marks})
    if len(xs) <= most:
        return xs
    return sorted({xs[round(i * (len(xs) - 1) / (most - 1))] for i in range(most)})


def value_at(line: Line, x: float) -> float | None:
    """The line's value at its last point up to `x`; none before its first and after its last."""
    points = line.drawn or line.marks
    i = bisect_right(points, (x, math.inf))
    return points[i - 1][1] if i and x <= points[-1][0] else None


def line_chart(
    name: str,
    x_axis: XAxis,
    lines: Sequence[Line],
    *,
    log: bool = False,
    share: bool = False,
    references: Sequence[Reference] = (),
) -> str:
    """The chart as one <svg>; `share` keeps zero in sight, `log` leaves out what is not positive."""
    if log:
        lines = [Line(n.index, n.key, _positive(n.drawn), _positive(n.raw), _positive(n.marks)) for n in lines]
    frame = _frame(lines, references, log=log, share=share)
    parts = [*_grid(frame, x_axis.label)]
    parts += [f'<path class="raw {look(n.index)}" d="{_path(frame, _envelope(n.raw))}"/>' for n in lines if n.raw]
    for n in lines:
        if len(n.drawn) > 1:
            parts.append(f'<path class="line {look(n.index)}" d="{_path(frame, _thin(n.drawn))}"/>')
        elif n.drawn:
            parts.append(_dot("point", frame, n, n.drawn[0]))
        parts += [_dot("mark", frame, n, mark) for mark in _thin(n.marks)]
    parts += [_reference(frame, r) for r in references]
    parts += _labels(frame, lines)
    parts += _readout(frame, x_axis.word, lines)
    said = ", ".join(f"{n.key} {short(p[-1][1])}" for n in lines if (p := n.drawn or n.marks))
    return _svg(f"{name} against {x_axis.label}; last values: {said}", frame.bottom + BOTTOM, parts)


def stacked_bars(name: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """One bar a row, as long as the sum of its parts, each part with its value where there is room for it."""
    longest = max((sum(values) for _, values in rows), default=0.0) or 1.0
    left, full, height = 26, WIDTH - 26 - 48, 24
    parts: list[str] = []
    for i, (key, values) in enumerate(rows):
        x, y = float(left), 6 + i * height
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 12}" text-anchor="end">{escape(key)}</text>')
        for part, value in enumerate(values):
            width = full * value / longest
            title = f"{key} {names[part]}: {short(value)}"
            parts.append(
                f'<rect class="f{part % NUM_COLOURS}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="17">'
                f"<title>{escape(title)}</title></rect>"
            )
            if width > 30:
                parts.append(f'<text class="in" x="{x + 4:.1f}" y="{y + 12}">{short(value)}</text>')
            x += width
        parts.append(f'<text class="tick" x="{x + 5:.1f}" y="{y + 12}">{short(sum(values))}</text>')
    return _svg(f"{name}; a table with the values follows", 8 + len(rows) * height, parts)


def stacked_area(
    name: str, x_axis: XAxis, names: Sequence[str], xs: Sequence[float], parts: Sequence[Sequence[float]]
) -> str:
    """The parts of a sum over `xs`, one above the other; `parts[i]` belongs to `names[i]`."""
    kept = [i for i, _ in _thin([(float(i), 0.0) for i in range(len(xs))])]
    chosen = [int(i) for i in kept]
    sums = [[0.0] * len(chosen)]
    for values in parts:
        sums.append([below + values[i] for below, i in zip(sums[-1], chosen, strict=True)])
    frame = _frame([Line(0, "", list(zip([xs[i] for i in chosen], sums[-1], strict=True)))], (), log=False, share=True)
    drawn = _grid(frame, x_axis.label)
    for part, (below, above) in enumerate(itertools.pairwise(sums)):
        there = [f"{frame.x(xs[i]):.1f},{frame.y(v):.1f}" for i, v in zip(chosen, above, strict=True)]
        back = [
            f"{frame.x(xs[i]):.1f},{frame.y(v):.1f}" for i, v in zip(reversed(chosen), reversed(below), strict=True)
        ]
        points = " ".join(there + back)
        drawn.append(
            f'<polygon class="f{part % NUM_COLOURS}" points="{points}"><title>{escape(names[part])}</title></polygon>'
        )
    return _svg(f"{name} against {x_axis.label}: {', '.join(names)}", frame.bottom + BOTTOM, drawn)


def swatch(index: int) -> str:
    """A run's line for a legend."""
    return f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path class="line {look(index)}" d="M1 4h26"/></svg>'


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height:.0f}">\n{inside}\n</svg>'


def _positive(points: Points) -> Points:
    return [(x, y) for x, y in points if y > 0]


def _frame(lines: Sequence[Line], references: Sequence[Reference], *, log: bool, share: bool) -> Frame:
    points = [p for n in lines for p in (*n.drawn, *n.raw, *n.marks)]
    xs, ys = [x for x, _ in points] or [0.0], [y for _, y in points] or [1.0]
    ys += [r.value for r in references]
    low, high = min(ys), max(ys)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low) + 1e-9), 10.0 ** math.ceil(math.log10(high) - 1e-9)
        high = high if high > low else low * 10
    else:
        if share or (low >= 0 and low < 0.6 * high):
            low = min(0.0, low)
        if high - low < 1e-9 * max(abs(high), 1e-9):
            low, high = (0.0, 1.0) if share else (low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)
        step = (t := ticks(low, high))[1] - t[0] if len(ticks(low, high)) > 1 else high - low
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    widest = max((len(_label(n)) for n in lines), default=0)
    num_labels = sum(1 for n in lines if n.drawn or n.marks)
    bottom = max(HEIGHT - BOTTOM, TOP + LABEL_GAP * (num_labels + 1))
    high_x = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return Frame(min(xs), high_x, low, high, WIDTH - 8 - 7 * widest, bottom, log)


def _grid(frame: Frame, x_label: str) -> list[str]:
    if frame.log:
        first, last = round(math.log10(frame.low)), round(math.log10(frame.high))
        values = [10.0**i for i in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]
    else:
        values = ticks(frame.low, frame.high)
    parts = []
    for value in values:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(value, frame.log)}</text>'
        )
    for value in ticks(frame.low_x, frame.high_x):
        parts.append(
            f'<text class="tick" x="{frame.x(value):.1f}" y="{frame.bottom + 14:.1f}" text-anchor="middle">{_tick(value)}</text>'
        )
    middle = (LEFT + frame.right) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{frame.bottom + 29:.1f}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _tick(value: float, log: bool = False) -> str:
    return f"1e{round(math.log10(value))}" if log else place(value)


def _reference(frame: Frame, reference: Reference) -> str:
    y = frame.y(reference.value)
    text = f"{reference.label} {short(reference.value)}"
    return (
        f'<path class="paper" d="M{LEFT} {y:.1f}H{frame.right:.1f}"/>'
        f'<text class="paper" x="{LEFT + 4}" y="{y - 4:.1f}">{escape(text)}</text>'
    )


def _path(frame: Frame, points: Points) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def _thin(points: Points) -> Points:
    """At most LINE_POINTS of them, evenly, the last one always there."""
    if len(points) <= LINE_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (LINE_POINTS - 1))] for i in range(LINE_POINTS)]


def _envelope(points: Points) -> Points:
    """The lowest and the highest of each of RAW_BUCKETS stretches, in their order: no peak is lost."""
    if len(points) <= 2 * RAW_BUCKETS:
        return points
    kept: list[tuple[float, float]] = []
    for i in range(RAW_BUCKETS):
        bucket = points[i * len(points) // RAW_BUCKETS : (i + 1) * len(points) // RAW_BUCKETS]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def _dot(kind: str, frame: Frame, line: Line, point: tuple[float, float]) -> str:
    title = f"{line.key} at {place(point[0])}: {short(point[1])}"
    x, y, size = frame.x(point[0]), frame.y(point[1]), 3.2 if len(line.marks) <= 12 else 2
    return (
        f'<circle class="{kind} {look(line.index)}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _label(line: Line) -> str:
    points = line.drawn or line.marks
    return f"{line.key} {short(points[-1][1])}" if points else ""


def _labels(frame: Frame, lines: Sequence[Line]) -> list[str]:
    """Key and last value at the end of each line, moved apart where they would lie on each other."""
    wanted = sorted((frame.y((n.drawn or n.marks)[-1][1]), n.index, n) for n in lines if n.drawn or n.marks)
    places: list[float] = []
    for y, _, _ in wanted:
        places.append(max(y, places[-1] + LABEL_GAP) if places else max(y, TOP + 4))
    overflow = places[-1] - frame.bottom if places else 0
    for i in range(len(places) - 1, -1, -1):
        if overflow <= 0:
            break
        places[i] = min(places[i], frame.bottom - LABEL_GAP * (len(places) - 1 - i))
    parts = []
    for spot, (y, _, line) in zip(places, wanted, strict=True):
        end = frame.x((line.drawn or line.marks)[-1][0])
        if abs(spot - y) > 3 or frame.right - end > 3:
            parts.append(f'<path class="leader" d="M{end:.1f} {y:.1f}L{frame.right + 4:.1f} {spot:.1f}"/>')
        parts.append(
            f'<text class="label {look(line.index)}" x="{frame.right + 7:.1f}" y="{spot + 3.5:.1f}">{escape(_label(line))}</text>'
        )
    return parts


def _readout(frame: Frame, word: str, lines: Sequence[Line]) -> list[str]:
    """Columns that show every line's value while the pointer is over them or a finger rests on them."""
    places = columns(lines, max(8, 160 // max(len(lines), 5)))
    parts = []
    for i, x in enumerate(places):
        at = frame.x(x)
        left = LEFT if i == 0 else (frame.x(places[i - 1]) + at) / 2
        right = frame.right if i == len(places) - 1 else (at + frame.x(places[i + 1])) / 2
        shown = [(n, v) for n in lines if (v := value_at(n, x)) is not None]
        box = at + 6 if at < (LEFT + frame.right) / 2 else at - 6 - READ_WIDTH
        text = "".join(
            f'<tspan class="{look(n.index)}" x="{box + 6:.1f}" dy="12">{escape(n.key)} {short(v)}</tspan>'
            for n, v in shown
        )
        parts.append(
            f'<g class="col" tabindex="-1"><rect class="hit" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0):.1f}" '
            f'height="{frame.bottom - TOP:.1f}"/><g class="read"><path d="M{at:.1f} {TOP}V{frame.bottom:.1f}"/>'
            f'<rect x="{box:.1f}" y="{TOP}" width="{READ_WIDTH}" height="{12 * len(shown) + 19}" rx="4"/>'
            f'<text x="{box + 6:.1f}" y="{TOP + 13}">{escape(word)} '
            f"{place(x)}{text}</text></g></g>"
        )
    return parts
