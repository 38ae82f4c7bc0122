"""What an evaluation leaves on disk: `<name>.json` (everything), `.md` (tables) and `.jsonl` (one attempt a line).

Accuracies stand beside those of the paper's Table 3; a number with a star has a warning below the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torl_mega.rollout.evaluate import KNOWN_SIZES, EvalReport, canonical_name
from torl_mega.run import paper
from torl_mega.run.files import replacing, write_json, write_text
from torl_mega.types import CollectedGroups, Reward, Trajectory

PAPER_TABLE_3 = {f"{paper.OURS[size]} (paper)": paper.row(size, paper.OURS[size]) for size in paper.TABLE_3}


SOURCE_NOTE = "torl_source.json"  # in an HF folder that was converted from a checkpoint: which one


def policy_of(model: str, step: int) -> dict[str, Any]:
    """What was evaluated: the model, the checkpoint it was converted from, and the training steps since."""
    try:
        source = json.loads((Path(model) / SOURCE_NOTE).read_text())
    except FileNotFoundError:
        source = {"model": model, "checkpoint": None}
    return {**source, "served": model, "step": step}


def name_of_policy(model: str) -> str:
    """A name for the results of a model that is not being trained, e.g. `quickstart_hf` for runs/quickstart/hf."""
    path = Path(model).resolve()
    return f"{path.parent.name}_{path.name}" if path.name == "hf" else path.name


def write_report(
    folder: Path, name: str, report: EvalReport, collected: CollectedGroups, policy: Mapping[str, Any]
) -> None:
    """Writes `folder/<name>.{jsonl,json,md}`, each atomically. `policy`: `policy_of` what was evaluated."""
    _write_transcripts(folder / f"{name}.jsonl", collected)
    write_json(folder / f"{name}.json", {"policy": dict(policy), **report.to_json()})
    write_text(folder / f"{name}.md", to_markdown(report, name=name))


def to_markdown(report: EvalReport, *, name: str) -> str:
    """One row for this model next to the paper's, one row per benchmark with intervals, then the warnings."""
    lines = [*_paper_table(report, name), "", *_detail_table(report), "", *_warning_list(report)]
    return "\n".join(lines).rstrip() + "\n"


def _paper_table(report: EvalReport, name: str) -> list[str]:
    columns = list(KNOWN_SIZES) + [b.name for b in report.benchmarks if b.name not in KNOWN_SIZES]
    ours = {b.name: 100 * b.accuracy.value for b in report.benchmarks}
    doubtful = {b.name for b in report.benchmarks if b.warnings}
    lines = [f"| | {' | '.join(columns)} | avg |", "|---" * (len(columns) + 2) + "|"]
    for model, row in {name: ours, **PAPER_TABLE_3}.items():
        cells = [f"{row[c]:.1f}{'*' if row is ours and c in doubtful else ''}" if c in row else "–" for c in columns]
        lines.append(f"| {model} | {' | '.join(cells)} | {sum(row.values()) / len(row):.1f} |")
    return lines


def _detail_table(report: EvalReport) -> list[str]:
    lines = [
        "| benchmark | problems | attempts | accuracy | 95 % | pass@k | code ratio | pass ratio | tokens | cut off |"
    ]
    lines.append("|---" * 10 + "|")
    for b in report.benchmarks:
        passes = ", ".join(f"@{k} {100 * e.value:.1f}" for k, e in b.pass_at.items())
        lines.append(
            f"| {b.name} | {b.num_problems} | {b.num_samples} | avg@{b.samples_per_problem} {100 * b.accuracy.value:.1f} | "
            f"{100 * b.accuracy.low:.1f}–{100 * b.accuracy.high:.1f} | {passes} | {b.code_ratio:.2f} | {b.pass_ratio:.2f} | "
            f"{b.response_length:.0f} | {b.truncated_ratio:.2f} |"
        )
    return lines


def _warning_list(report: EvalReport) -> list[str]:
    return [f"- \\* {b.name}: {warning}" for b in report.benchmarks for warning in b.warnings] + [
        f"- {canonical_name(Path(spec).stem)}: absent, and not in avg ({spec} is not there); docs/evaluation.md says where "
        "it comes from"
        for spec in report.absent
    ]


def _write_transcripts(path: Path, collected: CollectedGroups) -> None:
    """One line per attempt: problem, what was written and shown, the compared answer and the verdict."""
    with replacing(path) as out:
        for group in collected.groups:
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
                line = json.dumps(transcript(trajectory, reward), ensure_ascii=False) + "\n"
                out.write(line.encode("utf-8", "backslashreplace"))


def transcript(trajectory: Trajectory, reward: Reward) -> dict[str, Any]:
    """One line of `eval/*.jsonl`."""
    problem = trajectory.prompt.problem
    return {
        "problem_id": problem.problem_id,
        "source": problem.source,
        "sample": trajectory.sample_index,
        "problem": problem.problem,
        "gold": problem.answer,
        "extracted": reward.extracted,
        "correct": reward.correct,
        "grader": reward.status.value,
        "stop_reason": trajectory.stop_reason.value,
        "num_tokens": len(trajectory.response_ids),
        "tool_calls": [
            {"status": c.status.value, "code": c.code, "observation": c.observation} for c in trajectory.tool_calls
        ],
        "response": trajectory.response_text,
    }
