"""docs/reproduction.md and its figures, made of docs/reproduction/*.json alone: tables, curves, and the tests set beforehand.

Contract: the same data give the same page. What lacks runs says so. Intervals are Student's t over seeds unless something else is
said.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_traces import MIX
from reproduction_checks import checks
from reproduction_data import ARMS, FAST, Run, Runs, accuracies, command, ends, minutes, percent, read, shown

from torl_mega.data import word_problems
from torl_mega.rollout.benchmark_table import PAPER_TABLE_3
from torl_mega.run import paper

PAPER_TABLE_4 = {"no_tool": (118, "–"), "torl": (237, "baseline"), "c2": (288, "+2 points on average")}
RL_WITHOUT_TOOL = ("SimpleRL-Zero", "Eurus-2-7B-PRIME")  # of the paper's Table 3
START_S = 25.0  # from the command to where a run's own clock starts: imports, engines
PANELS = {
    "code_ratio": "answers with code",
    "pass_ratio": "programs that ended OK",
    "pass_ratio_correct": "… of correct answers",
    "pass_ratio_incorrect": "… of wrong answers",
    "executed_code_ratio": "pieces of code that ran",
    "code_before_answer_ratio": "pieces of code before the answer",
}
HEAD = """# The paper in small

Made by `python tools/reproduce.py` (`make reproduce`) of `docs/reproduction/*.json`, one file for each run with its settings,
machine and versions. No result below is typed by hand; the paper's own numbers are (arXiv 2503.23383). `make reproduce-fast` runs
the first two arms over three seeds. Both are resumable.

**What it is.** A Qwen2 of 2.2M parameters (`conf/paper_small/model`), pre-trained by `torl pretrain` (`make paper-base`) to answer
word problems in text and by programs, well and badly, then trained by the paper's recipe: GRPO, no KL, ±1 for the answer, one
update a step, temperature 1. Problems are of eight generated families (`torl_mega/data/word_problems.py`): for easy ones the head
suffices, hard ones want Python. It can show the paper's dynamics, not its benchmarks.
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
        HEAD, limits(runs), provenance(runs), accuracy_table(runs), cost_table(runs), figures(runs, docs / "img"),
        tests_table(runs), behaviour_table(runs), controls(runs), REAL,
    ]  # fmt: skip
    (docs / "reproduction.md").write_text("\n".join(parts).rstrip() + "\n")


def limits(runs: Runs) -> str:
    """What it cannot show, and what was made smaller than it should be."""
    short = f" Answers are short: {_lengths(runs)}." if any(runs.values()) else ""
    lines = [
        _prose(
            "**What it cannot show.** No family makes two calls necessary, one program could always do it all; the base knows a "
            f"few forms of program for each family, so nothing here is discovered from nothing.{short}"
        ),
        "",
        _prose(
            "**How far what is evaluated is new.** No text that is evaluated on was trained on, by RL or before. "
            f"`{_held_out()}` is left out of RL, not of pre-training. Of the {word_problems.NUM_HELD} problems of the other "
            f"families {_known_numbers()} have the numbers of a training problem in another wording, most of them easy ones."
        ),
    ]
    every = [run for of in runs.values() for run in of]
    if every:
        recipe, problems = every[0]["recipe"], word_problems.NUM_HELD + word_problems.NUM_HELD // 8
        lines += [
            "",
            _prose(
                f"**Sized for two cores.** {len(every[0]['curves']['accuracy'])} steps of {recipe['rollout.prompts_per_step']} "
                f"prompts × {recipe['rollout.group_size']} attempts, {problems} problems evaluated with "
                f"{_sampled(recipe)}. The paper takes greedy answers and hundreds of steps of 128 × 16."
            ),
        ]
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


def _sampled(recipe: Mapping[str, Any]) -> str:
    """How an evaluation samples."""
    count, temperature = recipe["eval.samples_per_problem"], recipe["eval.temperature"]
    return f"{count} answer{'s' if count != 1 else ''} each at temperature {temperature:g}"


def _lengths(runs: Runs) -> str:
    said = []
    for arm in (arm for arm in ("torl", "no_tool") if runs[arm]):
        start, end = (statistics.fmean(ends(run, "response_length")[i] for run in runs[arm]) for i in (0, 1))
        said.append(f"{start:.0f} tokens in the first steps and {end:.0f} in the last ({ARMS[arm].name})")
    return ", ".join(said)


def _held_out() -> str:
    return ", ".join(word_problems.HELD_OUT)


def _known_numbers() -> int:
    """Problems that are evaluated on whose family and numbers are also a training problem's."""
    trained = {_numbers(p) for p in word_problems.train()}
    return sum(_numbers(p) in trained for p in word_problems.held_in())


def _numbers(problem: Any) -> tuple[Any, ...]:
    return problem.source, tuple(sorted(problem.extra["numbers"].items()))


def provenance(runs: Runs) -> str:
    every = [run for of in runs.values() for run in of]
    lines = ["## Runs", "", "| arm | command | seeds | steps | minutes a run |", "|---|---|---|---|---|"]
    for arm, of in runs.items():
        for line in dict.fromkeys(command(run) for run in of):
            alike = [run for run in of if command(run) == line]
            steps = " or ".join(sorted({str(len(run["curves"]["accuracy"])) for run in alike}))
            seeds = ", ".join(str(run["seed"]) for run in alike)
            mean = statistics.fmean(map(minutes, alike))
            wanted = "" if len(of) >= ARMS[arm].seeds else f" of {ARMS[arm].seeds}"
            lines.append(f"| {ARMS[arm].name} | `{line}` | {seeds}{wanted} | {steps} | {mean:.1f} |")
    if not every:
        return "\n".join([*lines, "", "**Nothing has run.**"]) + "\n"
    machines = sorted(
        {f"{run['versions']['chip'].replace(' × ', ' cores of ')}, Python {run['versions']['python']}" for run in every}
    )
    packages = ("torch", "megatron-core", "sglang", "transformers")
    versions = sorted({", ".join(f"{name} {run['versions'][name]}" for name in packages) for run in every})
    bases = sorted({run["base_sha256"][:12] for run in every})
    lines += [
        "",
        _prose(
            f"On {'; '.join(machines)}; {'; '.join(versions)}; base weights of SHA-256 {' and '.join(bases)}…. Minutes are those "
            f"of the steps. With both evaluations and {START_S:g} s each to start the {len(every)} runs took "
            f"{sum(map(_whole_minutes, every)) / 60:.1f} hours. {_expected_hours(runs)}"
        ),
    ]
    missing = [arm.name for key, arm in ARMS.items() if not runs[key]]
    if missing:
        lines += ["", _prose(f"**Not run:** {'; '.join(missing)}.")]
    worst = max(run["max_abs_logprob_diff"] for run in every)
    lines += ["", f"The largest difference of server and trainer at any token's log-prob was {worst:.1e}."]
    return "\n".join(lines) + "\n"


def _whole_minutes(run: Run) -> float:
    return (run["total_s"] + START_S) / 60


def _expected_hours(runs: Runs) -> str:
    """Of both commands on two such cores, by the runs that are there; an arm without one takes as long as C = 1."""
    if not (runs["torl"] and runs["no_tool"]):
        return ""
    mean = {arm: statistics.fmean(map(_whole_minutes, runs[arm] or runs["torl"])) for arm in ARMS}
    whole = sum(arm.seeds * mean[key] for key, arm in ARMS.items())
    fast = sum(seeds * mean[arm] for arm, seeds in FAST.items())
    seeds = sum(arm.seeds for arm in ARMS.values())
    return f"So `make reproduce` ({seeds} runs) takes {whole / 60:.1f} hours, `make reproduce-fast` {fast:.0f} minutes."


def accuracy_table(runs: Runs) -> str:
    """Shaped as the paper's Table 3: models down, benchmarks across."""
    how = {_sampled(run["recipe"]) for of in runs.values() for run in of}
    families = tuple(word_problems.FAMILIES)
    lines = [
        "## Accuracy (the paper's Table 3)",
        "",
        _prose(
            f"Problems with {' or '.join(sorted(how)) or 'no answers'}, in %; mean ± 95 % over seeds (of the base: over samplings "
            "of the same weights). The last column is the mean of the eight families; "
            f"`{_held_out()}` is the one that RL leaves out."
        ),
        "",
        f"| | {' | '.join(families)} | mean |",
        "|---" * (len(families) + 2) + "|",
    ]
    rows = [(f"the base, prompted, C = {c}", arm, "before") for c, arm in ((1, "torl"), (0, "no_tool"), (2, "c2"))]
    rows += [(arm.name, key, "after") for key, arm in ARMS.items()]
    for name, arm, when in rows:
        if runs[arm]:
            cells = [percent(accuracies(runs[arm], when, family)) for family in (*families, None)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "The paper's own:", "", f"| | {' | '.join(paper.BENCHMARKS)} |", "|---" * 6 + "|"]
    others = {f"{name} (RL without a tool)": paper.row("7b", name) for name in RL_WITHOUT_TOOL}
    lines += [f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in {**PAPER_TABLE_3, **others}.items()]
    lines.append("\nIts abstract puts ToRL-7B 14 points above RL without a tool of its own on AIME24.")
    return "\n".join(lines) + "\n"


def cost_table(runs: Runs) -> str:
    """Shaped as the paper's Table 4: C against time and accuracy."""
    lines = ["## What calls cost (the paper's Table 4)", ""]
    lines += ["| C | step here | accuracy here | step in the paper | accuracy there |", "|---|---|---|---|---|"]
    for c, arm in enumerate(("no_tool", "torl", "c2")):
        seconds, gain = PAPER_TABLE_4[arm]
        step = accuracy = "not run"
        if runs[arm]:
            step = shown([statistics.fmean(run["curves"]["step_s"]) for run in runs[arm]], "{:.1f}") + " s"
            accuracy = percent(accuracies(runs[arm], "after"))
        lines.append(f"| {c} | {step} | {accuracy} | {seconds} s | {gain} |")
    lines.append("\nHere on a machine that other work shared, so seconds say little; the paper's are of eight A800.")
    return "\n".join(lines) + "\n"


def tests_table(runs: Runs) -> str:
    lines = [
        "## What was to be shown, set before the runs",
        "",
        "| claim | test | found | outcome |",
        "|---|---|---|---|",
    ]
    for claim, test, check in checks():
        outcome = check(runs)
        lines.append(f"| {claim} | {test} | {outcome.found} | {outcome} |")
    notes = _prose(
        "Moving means overlap, so their rank correlation is high for any drift; that of single steps stands beside it. A curve "
        "that is constant at its end from the first step on cannot rise. (d) can be found only if C = 1 leaves enough to gain; "
        "that (e) held says that no gain was found, not that there is none."
    )
    lines += ["", notes]
    return "\n".join(lines) + "\n"


def behaviour_table(runs: Runs) -> str:
    from scipy.stats import fisher_exact

    lines = [
        "## Behaviours, counted",
        "",
        _prose(
            "In the answers of the first and of the last five training steps. By seed, and p of all of them by Fisher's exact "
            "test, which takes answers to one problem for independent, so that p is too small."
        ),
        "",
        "| arm | behaviour | before | after | p |",
        "|---|---|---|---|---|",
    ]
    for arm, name, (hits, of) in _behaviours(runs):
        counts = [
            [[run["behaviour"][when][key] for key in (hits, of)] for run in runs[arm]] for when in ("before", "after")
        ]
        totals = [[sum(column) for column in zip(*by_seed, strict=True)] for by_seed in counts]
        table = [[hit, total - hit] for hit, total in totals]
        p = f"{float(fisher_exact(table)[1]):.2g}" if all(total for _, total in totals) else "–"  # type: ignore[arg-type]
        before, after = (", ".join(f"{hit}/{total}" for hit, total in by_seed) for by_seed in counts)
        lines.append(f"| {ARMS[arm].name} | {name} | {before} | {after} | {p} |")
    notes = _prose(
        f"With C = 1 no second program runs, so only C = 2 can show repairs. {MIX.follow:.0%} of what the base was taught follows "
        "the output where prose and output differ: what is seen is whether RL makes that more."
    )
    lines += ["", notes]
    for arm, name, (hits, _) in _behaviours(runs):
        lines += _examples(name, arm, hits, runs[arm])
    return "\n".join(lines) + "\n"


def _behaviours(runs: Runs) -> list[tuple[str, str, tuple[str, str]]]:
    """(arm, what is counted, (hits, of)) of each that can be seen."""
    repaired = ("a program fails, another one ends OK", ("repaired", "failed"))
    followed = ("prose and output differ, the answer is the output", ("followed", "differed"))
    wanted = [("torl", *followed), ("c2", *repaired), ("c2", *followed)]
    return [row for row in wanted if runs[row[0]]]


def _examples(name: str, arm: str, kind: str, runs: Sequence[Run]) -> list[str]:
    """One answer after RL, in full, and where the viewer shows it and others."""
    found = [(run["seed"], e) for run in runs for e in run["behaviour"]["after"].get("examples", {}).get(kind, ())]
    if not found:
        return []
    example = next((e for _, e in found if "````" not in e["text"]), found[0][1])
    pages = [f"`{arm}__seed{seed}/view/index.html#{e['address']}`" for seed, e in found[:3]]
    return [
        "",
        f"**{ARMS[arm].name}: {name}**, after RL. In the runs' folder (`runs/reproduction`), once `torl view` has made a run's",
        f"page: {', '.join(pages)}. The first one:",
        "",
        "````",
        example["problem"],
        example["text"].rstrip(),
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
        both = " → ".join(percent(accuracies(runs[arm], when)) for when in ("before", "after"))
        lines.append(f"| {ARMS[arm].name} | {what} | {both if runs[arm] else 'not run'} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- figures


def figures(runs: Runs, folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not any(runs.values()):
        return ""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for arm in (a for a in ("torl", "no_tool") if runs[a]):
        _curve(axes[0], runs[arm], "accuracy", ARMS[arm].name)
        _curve(axes[1], runs[arm], "accuracy", ARMS[arm].name, against="num_trained_tokens")
    axes[0].set(xlabel="step", ylabel="training accuracy")
    axes[1].set(xlabel="sampled tokens, in thousands")
    axes[0].legend(fontsize=7)
    _save(figure, folder / "reproduction_accuracy.png")
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for arm in (a for a in ("torl", "c2") if runs[a]):
            _curve(axis, runs[arm], name, ARMS[arm].name)
        axis.set_title(title, fontsize=8)
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("step")
    _save(figure, folder / "reproduction_code.png")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    by_calls = [a for a in ("torl", "c2", "code_error") if runs[a]]
    for axis, name in zip(axes, ("reward", "accuracy"), strict=True):
        for arm in by_calls:
            _curve(axis, runs[arm], name, ARMS[arm].name)
        axis.set(xlabel="step", ylabel=name)
    axes[0].legend(fontsize=7)
    _save(figure, folder / "reproduction_calls.png")
    absent = [ARMS[a].name for a in ("torl", "c2", "code_error") if a not in by_calls]
    return f"""## Curves

Lines are means over seeds, bands span them.

The paper's Figures 1 and 4: accuracy with and without a tool, by step and by sampled tokens.

![accuracy with and without a tool](img/reproduction_accuracy.png)

The paper's Figure 5. There (§3.3.1) the code ratio goes from 0.40 to 0.80 in the first hundred steps, and the pass ratio rises from
0.76, as read off the figure.

![code ratios and pass ratios](img/reproduction_code.png)

The paper's Figure 6: reward and accuracy by C and with the penalty{f"; not run: {'; '.join(absent)}" if absent else ""}.

![reward and accuracy by C](img/reproduction_calls.png)
"""


def _curve(axis: Any, of: Sequence[Run], name: str, label: str, against: str | None = None) -> None:
    """As far as all runs of the arm go."""
    steps = list(zip(*(run["curves"][name] for run in of), strict=False))
    at: Sequence[float] = range(1, len(steps) + 1)
    if against:
        per_step = [statistics.fmean(x) / 1000 for x in zip(*(run["curves"][against] for run in of), strict=False)]
        at = [sum(per_step[: i + 1]) for i in range(len(steps))]
    (line,) = axis.plot(at, [statistics.fmean(s) for s in steps], label=label)
    axis.fill_between(at, [min(s) for s in steps], [max(s) for s in steps], color=line.get_color(), alpha=0.2)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
