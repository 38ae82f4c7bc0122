"""One static HTML page of a step's trajectories. No script, nothing fetched: it opens from a mail attachment.

Contract: whatever a model or a program wrote is data. Jinja escapes it, `visible` takes away what acts on the reader, and a
Content-Security-Policy forbids scripts, frames, forms and fetches; filters are CSS alone.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import jinja2

from torl_mega.rollout.recorder import Recorded
from torl_mega.types import ExecutionStatus, ToolCall, Trajectory
from torl_mega.view.spans import Decode, Span, spans_of, visible

OPEN_BELOW_TOKENS = 400  # longer answers start folded


@dataclass(frozen=True, slots=True)
class Card:
    """One trajectory as the template shows it."""

    anchor: str
    classes: str
    correct: bool
    sample_index: int
    reward: str
    advantage: str
    extracted: str
    grader: str
    calls: tuple[tuple[str, str], ...]  # (class, text)
    num_sampled: int
    num_inserted: int
    stop_reason: str
    open: bool
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One problem and its attempts."""

    problem_id: str
    problem: str
    answer: str
    num_correct: int
    cards: tuple[Card, ...]


def trajectories_page(
    run: str, step: int, shown: Sequence[Recorded], *, num_recorded: int, decode: Decode | None, note: str
) -> str:
    """The page's HTML: `shown` in order, of the `num_recorded` that the step has, with `note` as a line for the reader."""
    return (
        environment()
        .get_template("trajectories.html.j2")
        .render(
            run=run,
            step=step,
            sections=_sections(shown, decode),
            num_shown=len(shown),
            num_recorded=num_recorded,
            tiles=_tiles(shown),
            note=note,
            **style(),
        )
    )


def environment() -> jinja2.Environment:
    """Templates of this folder; everything that is filled in is escaped, and a missing value is an error."""
    loader = jinja2.FunctionLoader(lambda name: (files("torl_mega.view") / name).read_text("utf-8"))
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


@cache
def style() -> dict[str, str]:
    """The style sheet and the hash under which the page's policy allows it, and nothing else."""
    css = (files("torl_mega.view") / "style.css.j2").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return {"css": css, "css_hash": f"sha256-{digest}"}


def _sections(shown: Sequence[Recorded], decode: Decode | None) -> list[Section]:
    groups = [list(members) for _, members in itertools.groupby(shown, lambda recorded: recorded.group)]
    return [
        Section(
            problem_id=visible(group[0].trajectory.prompt.problem.problem_id),
            problem=visible(group[0].trajectory.prompt.problem.problem),
            answer=visible(group[0].trajectory.prompt.problem.answer),
            num_correct=sum(s.reward.correct for s in group),
            cards=tuple(_card(f"g{n}-{i}", s, decode) for i, s in enumerate(group)),
        )
        for n, group in enumerate(groups)
    ]


def _card(anchor: str, item: Recorded, decode: Decode | None) -> Card:
    trajectory, reward = item.trajectory, item.reward
    num_sampled = sum(trajectory.loss_mask)
    num_inserted = len(trajectory.loss_mask) - num_sampled
    return Card(
        anchor=anchor,
        classes=f"{'a-right' if reward.correct else 'a-wrong'} {_tool_class(trajectory)} s-{trajectory.stop_reason.value}",
        correct=reward.correct,
        sample_index=trajectory.sample_index,
        reward=f"{reward.value:+.2f}",
        advantage=f"{item.advantage:+.2f}",
        extracted="none" if reward.extracted is None else visible(reward.extracted)[:200],
        grader=reward.status.value,
        calls=tuple(_call(c) for c in trajectory.tool_calls),
        num_sampled=num_sampled,
        num_inserted=num_inserted,
        stop_reason=trajectory.stop_reason.value,
        open=num_sampled + num_inserted <= OPEN_BELOW_TOKENS,
        spans=tuple(spans_of(trajectory, decode)),
    )


def _tool_class(trajectory: Trajectory) -> str:
    if not trajectory.tool_calls:
        return "t-none"
    return "t-ok" if all(c.status is ExecutionStatus.OK for c in trajectory.tool_calls) else "t-failed"


def _call(call: ToolCall) -> tuple[str, str]:
    code = "" if call.return_code in (None, 0) else f" ({call.return_code})"
    kind = "ok" if call.status is ExecutionStatus.OK else "bad"
    name = "" if call.tool == "python" else f"{visible(call.tool) or 'no tool'} · "
    return kind, f"{name}{call.status.value}{code} · {call.wall_s * 1e3:.0f} ms"


def _tiles(shown: Sequence[Recorded]) -> list[tuple[str, str]]:
    """(name, value) of what is shown, computed from it alone."""
    calls = [c for s in shown for c in s.trajectory.tool_calls]
    num = max(len(shown), 1)
    return [
        ("accuracy", f"{sum(s.reward.correct for s in shown) / num:.3f}"),
        ("mean reward", f"{sum(s.reward.value for s in shown) / num:+.3f}"),
        ("answers that called the tool", f"{sum(bool(s.trajectory.tool_calls) for s in shown) / num:.3f}"),
        (
            "calls that ended ok",
            f"{sum(c.status is ExecutionStatus.OK for c in calls) / len(calls):.3f}" if calls else "–",
        ),
        ("tokens an answer", f"{sum(len(s.trajectory.response_ids) for s in shown) / num:.0f}"),
    ]
