"""docs/reproduction.md and its figures, made of docs/reproduction/*.json alone: tables, curves, and the tests set beforehand.

Contract: the same data give the same page. A test without the runs that it needs says `not run`. Intervals are Student's t over
seeds unless something else is said.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate import interval

from torl_mega.data.word_problems import FAMILIES, HELD_OUT
from torl_mega.rollout.benchmark_table import PAPER_TABLE_3

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]  # by arm, by seed
WINDOW = 16
NAMES = {
    "torl": "ToRL, C = 1",
    "no_tool": "RL without a tool, C = 0",
    "c2": "ToRL, C = 2",
    "code_error": "C = 1, −0.5 for a program that does not run",
    "plus": "C = 1, conf/plus.yaml's options",
    "noise": "control: the tool answers noise",
    "lot": "control: rewards by lot",
    "observations": "control: observations trained on",
}
PAPER_TABLE_4 = {"no_tool": (118, "–"), "torl": (237, "baseline"), "c2": (288, "+2 points on average")}
PANELS = {
    "code_ratio": "answers with code",
    "pass_ratio": "programs that ended OK",
    "pass_ratio_correct": "… of correct answers",
    "pass_ratio_incorrect": "… of wrong answers",
    "executed_code_ratio": "pieces of code that ran",
    "code_before_answer_ratio": "pieces of code before the answer",
}
HEAD = """# The paper in small

Made by `python tools/reproduce.py` (`make reproduce`) of `docs/reproduction/*.json`, one file for each run with its command,
machine and versions; nothing below is typed by hand but the paper's own numbers (arXiv 2503.23383). `make reproduce-fast` runs
the first two arms over three seeds. Both are resumable.

**What it is.** A Qwen2 of 2.2M parameters (`conf/paper_small/model`), pre-trained by `torl pretrain` (`make paper-base`) to answer
word problems in text and by programs, well and badly, then trained by the paper's recipe: GRPO, no KL, ±1 for the answer, one
update a step, temperature 1. Problems are of eight generated families (`torl_mega/data/word_problems.py`): for easy ones the head
suffices, hard ones want Python. One family is never trained on. It can show the paper's dynamics, not its benchmarks.

**What it cannot show.** No family makes two calls necessary, one program could always do it all; the base knows a few forms of
program for each family, so nothing here is discovered from nothing; answers are some fifty tokens long.
"""


REAL = """## The real thing

The same recipe at the paper's size, whose settings are compared with the released script's in [recipe.md](recipe.md); from an empty
machine to step 1: [first cluster run](first_cluster_run.md).

* runs: `sbatch launch/torl_1.5b.slurm`, `sbatch launch/torl_7b.slurm`; the arms above by `TORL_OVERRIDES`:
  `rollout.max_tool_calls=0` or `=2`, `reward.code_error=-0.5`
* data: `data/torl_train.parquet` of the released code; a file of that name without 28,740 problems is named at the start
* benchmarks: `data/aime24.jsonl` (30 problems), `aime25` (30), `math500` (500), `olympiadbench` (675), `amc23` (40), every 4 steps;
  files that are absent and other counts are named too
* end points: `torl report RUN --paper 7b` (or `1.5b`) draws those of Table 3 and §3.3.1 beside the run's curves
"""


def write(data: Path, docs: Path) -> None:
    runs = read(data)
    parts = [
        HEAD, provenance(runs), accuracy_table(runs), cost_table(runs), figures(runs, docs / "img"), tests_table(runs),
        behaviour_table(runs), controls(runs), REAL,
    ]  # fmt: skip
    (docs / "reproduction.md").write_text("\n".join(parts).rstrip() + "\n")


def read(data: Path) -> Runs:
    found: dict[str, list[Run]] = {arm: [] for arm in NAMES}
    for path in sorted(data.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["arm"]].append(run)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in found.items()}


def provenance(runs: Runs) -> str:
    done = {arm: len(of) for arm, of in runs.items() if of}
    missing = [name for arm, name in NAMES.items() if not runs[arm]]
    every = [run for of in runs.values() for run in of]
    lines = ["## Runs", "", "| arm | command | seeds | steps | minutes a run |", "|---|---|---|---|---|"]
    for arm in done:
        run = runs[arm][0]
        command = run["command"].replace(f"seed={run['seed']}", "seed=N")
        minutes = statistics.fmean(r["wall_s"] for r in runs[arm]) / 60
        seeds = ", ".join(str(r["seed"]) for r in runs[arm])
        lines.append(f"| {NAMES[arm]} | `{command}` | {seeds} | {len(run['curves']['accuracy'])} | {minutes:.1f} |")
    machines = sorted(
        {f"{r['machine']['cpu']}, {r['machine']['cores']} cores, Python {r['machine']['python']}" for r in every}
    )
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in every})
    lines += [
        "",
        f"On {'; '.join(machines) or 'nothing yet'}; {'; '.join(versions)}. Minutes are those of the steps, without the start.",
    ]
    hours = sum(r["wall_s"] for r in every) / 3600
    lines.append(f"The {len(every)} runs took {hours:.1f} hours of steps, and each about half a minute to start.")
    if missing:
        lines.append(f"**Not run:** {'; '.join(missing)}.")
    worst = max((r["max_abs_logprob_diff"] for r in every), default=0.0)
    lines.append(f"Server and trainer never disagreed on a token's log-prob by more than {worst:.0e}.")
    return "\n".join(lines) + "\n"


def accuracy_table(runs: Runs) -> str:
    """Shaped as the paper's Table 3: models down, benchmarks across."""
    lines = ["## Accuracy (the paper's Table 3)", ""]
    lines.append(
        "Of the problems that are evaluated on, two answers each at temperature 1, in %; mean ± 95 % over seeds."
    )
    lines.append(f"`{', '.join(HELD_OUT)}` is the family that is never trained on.\n")
    lines += [f"| | {' | '.join(FAMILIES)} | mean |", "|---" * (len(FAMILIES) + 2) + "|"]
    rows = [
        ("the base, C = 1", "torl", "before"),
        ("the base, C = 0", "no_tool", "before"),
        ("the base, C = 2", "c2", "before"),
    ]
    rows += [(name, arm, "after") for arm, name in NAMES.items()]
    for name, arm, when in rows:
        if runs[arm]:
            cells = [_percent([r["eval"][when].get(f"{f}/accuracy") for r in runs[arm]]) for f in FAMILIES]
            lines.append(
                f"| {name} | {' | '.join(cells)} | {_percent([r['eval'][when]['accuracy'] for r in runs[arm]])} |"
            )
    lines += [
        "",
        "The paper's own:",
        "",
        "| | AIME24 | AIME25 | MATH500 | Olympiad | AMC23 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in PAPER_TABLE_3.items()]
    lines.append("\nThere ToRL-7B is 14 points above RL without a tool on AIME24.")
    return "\n".join(lines) + "\n"


def cost_table(runs: Runs) -> str:
    """Shaped as the paper's Table 4: C against time and accuracy."""
    lines = ["## What calls cost (the paper's Table 4)", ""]
    lines += ["| C | step here | accuracy here | step in the paper | accuracy there |", "|---|---|---|---|---|"]
    for c, arm in enumerate(("no_tool", "torl", "c2")):
        seconds, gain = PAPER_TABLE_4[arm]
        if runs[arm]:
            step = _shown([statistics.fmean(r["curves"]["step_s"]) for r in runs[arm]], "{:.1f}") + " s"
            accuracy = _percent([r["eval"]["after"]["accuracy"] for r in runs[arm]])
        else:
            step = accuracy = "not run"
        lines.append(f"| {c} | {step} | {accuracy} | {seconds} s | {gain} |")
    lines.append(
        "\nHere on a machine that other work shared, so seconds say little; the paper's are of 1.5B on eight A800."
    )
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ tests


def tests_table(runs: Runs) -> str:
    lines = [
        "## What was to be shown, set before the runs",
        "",
        "| claim | test | found | outcome |",
        "|---|---|---|---|",
    ]
    rises = f"Spearman of {WINDOW}-step means with step > 0.8"
    checks: list[tuple[str, str, Callable[[Runs], tuple[str, bool] | None]]] = [
        ("(a) tool RL beats RL without", "lower 95 % bound of the paired difference > 0.15", _tool_gain),
        ("(a) RL without a tool improves too", "mean after > mean before", _no_tool_gain),
        ("(b) code ratio rises", rises, _rises("code_ratio")),
        ("(b) pass ratio rises", rises, _rises("pass_ratio")),
        ("(b) correct answers pass more", "mean pass ratio of correct above that of wrong answers", _correct_pass_more),
        ("(c) executed share of code rises", rises, _rises("executed_code_ratio")),
        ("(c) code moves before the answer", rises, _rises("code_before_answer_ratio")),
        ("(d) C = 2 beats C = 1 on choose and chain", "one-sided paired t-test over seeds, p < 0.05", _second_call),
        ("(e) −0.5 for failing programs is no gain", "95 % interval of the difference contains 0 or is below", _penalty),
    ]  # fmt: skip
    for claim, test, check in checks:
        outcome = check(runs)
        found, held = outcome if outcome else ("not run", None)
        lines.append(f"| {claim} | {test} | {found} | {'–' if held is None else 'held' if held else '**failed**'} |")
    return "\n".join(lines) + "\n"


def paired(runs: Runs, arm: str, other: str, families: Sequence[str] = ()) -> list[float]:
    """Accuracy of `arm` minus that of `other` after RL, seed by seed."""
    return [
        _accuracy(a, families) - _accuracy(b, families)
        for a in runs[arm]
        for b in runs[other]
        if a["seed"] == b["seed"]
    ]


def _accuracy(run: Run, families: Sequence[str]) -> float:
    after = run["eval"]["after"]
    return statistics.fmean(after[f"{f}/accuracy"] for f in families) if families else after["accuracy"]


def _tool_gain(runs: Runs) -> tuple[str, bool] | None:
    differences = paired(runs, "torl", "no_tool")
    if len(differences) < 2:
        return None
    mean, half = interval(differences)
    return f"{mean:+.3f} ± {half:.3f}, {len(differences)} seeds", mean - half > 0.15


def _no_tool_gain(runs: Runs) -> tuple[str, bool] | None:
    if not runs["no_tool"]:
        return None
    before, after = (
        statistics.fmean(r["eval"][when]["accuracy"] for r in runs["no_tool"]) for when in ("before", "after")
    )
    return f"{before:.3f} → {after:.3f}", after > before


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's between the moving means of WINDOW steps and the step."""
    from scipy.stats import spearmanr

    means = [statistics.fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]
    return 0.0 if len(set(means)) < 2 else float(spearmanr(range(len(means)), means)[0])  # type: ignore[arg-type]


def _rises(curve: str) -> Callable[[Runs], tuple[str, bool] | None]:
    def check(runs: Runs) -> tuple[str, bool] | None:
        found = [rank_correlation(r["curves"][curve]) for r in runs["torl"]]
        ends = [(statistics.fmean(c[:5]), statistics.fmean(c[-5:])) for r in runs["torl"] for c in [r["curves"][curve]]]
        if not found:
            return None
        shown = f"{statistics.fmean(a for a, _ in ends):.2f} → {statistics.fmean(b for _, b in ends):.2f}"
        return f"{', '.join(f'{x:.2f}' for x in found)}; {shown}", statistics.fmean(found) > 0.8

    return check


def _correct_pass_more(runs: Runs) -> tuple[str, bool] | None:
    if not runs["torl"]:
        return None
    names = ("pass_ratio_correct", "pass_ratio_incorrect")
    right, wrong = (statistics.fmean(x for r in runs["torl"] for x in r["curves"][name]) for name in names)
    return f"{right:.3f} and {wrong:.3f}", right > wrong


def _second_call(runs: Runs) -> tuple[str, bool] | None:
    from scipy.stats import ttest_1samp

    differences = paired(runs, "c2", "torl", ("choose", "chain"))
    if len(differences) < 2:
        return None
    p = float(ttest_1samp(differences, 0.0, alternative="greater").pvalue)  # type: ignore[attr-defined]
    return f"{statistics.fmean(differences):+.3f}, p = {p:.3f}, {len(differences)} seeds", p < 0.05


def _penalty(runs: Runs) -> tuple[str, bool] | None:
    differences = paired(runs, "code_error", "torl")
    if len(differences) < 2:
        return None
    mean, half = interval(differences)
    return f"{mean:+.3f} ± {half:.3f}, {len(differences)} seeds", mean - half <= 0


def behaviour_table(runs: Runs) -> str:
    from scipy.stats import fisher_exact

    lines = ["## Behaviours, counted", ""]
    lines.append("In the answers of the first and the last five steps, all seeds together; p by Fisher's exact test.\n")
    lines += ["| arm | behaviour | before | after | p |", "|---|---|---|---|---|"]
    kinds = {
        "a program fails, another one ends OK": ("repaired", "failed"),
        "prose and output differ, the answer is the output": ("followed", "differed"),
    }
    for arm in (arm for arm in ("torl", "c2") if runs[arm]):
        for name, (hits, of) in kinds.items():
            counts = [
                [sum(r["behaviour"][when][key] for r in runs[arm]) for key in (hits, of)]
                for when in ("before", "after")
            ]
            table = [[hit, total - hit] for hit, total in counts]
            p = float(fisher_exact(table)[1]) if all(total for _, total in counts) else 1.0  # type: ignore[arg-type]
            before, after = (f"{hit} of {total}" for hit, total in counts)
            lines.append(f"| {NAMES[arm]} | {name} | {before} | {after} | {p:.2g} |")
    lines.append("\nWith C = 1 a second program is written but never run, so only C = 2 can show the first one.")
    for arm in (arm for arm in ("torl", "c2") if runs[arm]):
        for name, (hits, _) in kinds.items():
            lines += _examples(name, arm, hits, runs[arm])
    return "\n".join(lines) + "\n"


def _examples(name: str, arm: str, kind: str, runs: Sequence[Run]) -> list[str]:
    """One answer after RL, in full, and where the viewer shows it and others."""
    found = [(r["seed"], e) for r in runs for e in r["behaviour"]["after"].get("examples", {}).get(kind, ())]
    if not found:
        return []
    shown = next((e for _, e in found if "````" not in e["text"]), found[0][1])
    pages = [f"`runs/reproduction/{arm}__seed{seed}/view/index.html#{e['address']}`" for seed, e in found[:3]]
    return [
        f"\n**{NAMES[arm]}: {name}**, after RL, in the viewer (`torl view runs/reproduction/{arm}__seed{found[0][0]}`): "
        f"{', '.join(pages)}. The first one:\n",
        "````",
        shown["problem"],
        shown["text"].rstrip(),
        "````",
    ]


def controls(runs: Runs) -> str:
    lines = ["## Controls", "", "| control | expected | accuracy before → after |", "|---|---|---|"]
    expected = {
        "noise": "falls to the arm without a tool: the gain comes from what the tool says, not from the form of a call",
        "lot": "learns nothing",
        "observations": "less stable, says the paper, which masks them",
    }
    for arm, what in expected.items():
        shown = "not run"
        if runs[arm]:
            shown = " → ".join(
                _percent([r["eval"][when]["accuracy"] for r in runs[arm]]) for when in ("before", "after")
            )
        lines.append(f"| {NAMES[arm]} | {what} | {shown} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- figures


def figures(runs: Runs, folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with_curves = {arm: of for arm, of in runs.items() if of}
    if not with_curves:
        return ""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for arm in (a for a in ("torl", "no_tool") if a in with_curves):
        _curve(axes[0], with_curves[arm], "accuracy", NAMES[arm])
        _curve(axes[1], with_curves[arm], "accuracy", NAMES[arm], against="num_trained_tokens")
    axes[0].set(xlabel="step", ylabel="training accuracy")
    axes[1].set(xlabel="sampled tokens")
    axes[0].legend(fontsize=7)
    _save(figure, folder / "reproduction_accuracy.png")
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for arm in (a for a in ("torl", "c2") if a in with_curves):
            _curve(axis, with_curves[arm], name, NAMES[arm])
        axis.set_title(title, fontsize=8)
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("step")
    _save(figure, folder / "reproduction_code.png")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    for axis, name in zip(axes, ("reward", "accuracy"), strict=True):
        for arm in (a for a in ("torl", "c2", "code_error") if a in with_curves):
            _curve(axis, with_curves[arm], name, NAMES[arm])
        axis.set(xlabel="step", ylabel=name)
    axes[0].legend(fontsize=7)
    _save(figure, folder / "reproduction_calls.png")
    return """## Curves

Lines are means over seeds, bands span them.

The paper's Figures 1 and 4: accuracy with and without a tool, by step and by sampled tokens.

![accuracy with and without a tool](img/reproduction_accuracy.png)

The paper's Figure 5. There the code ratio of the 7B goes from 0.40 to 0.80 in the first hundred steps, and the pass ratio rises
from 0.76.

![code ratios and pass ratios](img/reproduction_code.png)

The paper's Figure 6: reward and accuracy by C and with the penalty.

![reward and accuracy by C](img/reproduction_calls.png)
"""


def _curve(axis: Any, of: Sequence[Run], name: str, label: str, against: str | None = None) -> None:
    steps = list(zip(*(r["curves"][name] for r in of), strict=True))
    at: Sequence[float] = range(1, len(steps) + 1)
    if against:
        per_step = [statistics.fmean(x) for x in zip(*(r["curves"][against] for r in of), strict=True)]
        at = [sum(per_step[: i + 1]) for i in range(len(per_step))]
    (line,) = axis.plot(at, [statistics.fmean(s) for s in steps], label=label)
    axis.fill_between(at, [min(s) for s in steps], [max(s) for s in steps], color=line.get_color(), alpha=0.2)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * v for v in values if v is not None]
    return _shown(known, "{:.1f}") if known else "–"


def _shown(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    return form.format(mean) + (f" ± {form.format(half)}" if len(values) > 1 else "")
