"""What the paper in small was to show, as tests that were set before the first run, with their outcomes.

Contract: a check gives what it found and whether the claim held, or says in words why it cannot be decided (no run, one seed where
an interval is needed, too few steps).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ablate import interval
from reproduction_data import Run, Runs, accuracies, ends, shown

WINDOW = 16
NOT_RUN = "not run"
TWO_CALLS = ("choose", "chain")  # the families in which a second call can help


@dataclass(frozen=True, slots=True)
class Outcome:
    found: str
    held: bool | None = None  # None: cannot be decided

    def __str__(self) -> str:
        return {None: "–", True: "held", False: "**failed**"}[self.held]


Check = Callable[[Runs], Outcome]


def checks() -> list[tuple[str, str, Check]]:
    """(claim, test, check) of each."""
    rises = f"Spearman of {WINDOW}-step means with step, mean over seeds > 0.8"
    return [
        ("(a) tool RL beats RL without", "lower 95 % bound of the paired difference > 0.15", tool_gain),
        ("(a) RL without a tool improves too", "mean after > mean before", no_tool_gain),
        ("(b) code ratio rises", rises, rising("code_ratio")),
        ("(b) pass ratio rises", rises, rising("pass_ratio")),
        ("(b) correct answers pass more", "mean pass ratio of correct above that of wrong answers", correct_pass_more),
        ("(c) executed share of code rises", rises, rising("executed_code_ratio")),
        ("(c) code moves before the answer", rises, rising("code_before_answer_ratio")),
        ("(d) C = 2 beats C = 1 on choose and chain", "one-sided paired t-test over seeds, p < 0.05", second_call),
        ("(e) −0.5 for failing programs is no gain", "95 % interval of the difference contains 0 or is below", penalty),
    ]


def paired(runs: Runs, arm: str, other: str, families: Sequence[str] = ()) -> list[float]:
    """Accuracy of `arm` minus that of `other` after RL, seed by seed."""
    return [
        _accuracy(a, families) - _accuracy(b, families)
        for a in runs[arm]
        for b in runs[other]
        if a["seed"] == b["seed"]
    ]


def _accuracy(run: Run, families: Sequence[str]) -> float:
    return statistics.fmean(accuracies([run], "after", family)[0] for family in families or [None])


def _too_few(differences: Sequence[float]) -> Outcome | None:
    if len(differences) > 1:
        return None
    return Outcome("one seed, no interval" if differences else NOT_RUN)


def _gain(differences: Sequence[float]) -> str:
    return f"{shown(differences, '{:+.3f}')}, {len(differences)} seeds"


def _lower(differences: Sequence[float]) -> float:
    """Lower bound of the 95 % interval."""
    mean, half = interval(differences)
    return mean - half


def tool_gain(runs: Runs) -> Outcome:
    differences = paired(runs, "torl", "no_tool")
    if few := _too_few(differences):
        return few
    return Outcome(_gain(differences), _lower(differences) > 0.15)


def no_tool_gain(runs: Runs) -> Outcome:
    of = runs["no_tool"]
    if not of:
        return Outcome(NOT_RUN)
    before, after = (accuracies(of, when) for when in ("before", "after"))
    gain = shown([b - a for a, b in zip(before, after, strict=True)], "{:+.3f}")
    answered, right = [], []
    for when in ("before", "after"):
        # of all answers, families unweighted: not the mean above, which weighs the eight families alike
        attempts = [(1 - r["eval"][when]["no_answer_ratio"], _share_right(r, when)) for r in of]
        answered.append(statistics.fmean(a for a, _ in attempts))
        right.append(statistics.fmean(x / a for a, x in attempts if a))
    text = (
        f"{statistics.fmean(before):.3f} → {statistics.fmean(after):.3f} ({gain}); a boxed answer is given by {answered[0]:.2f} → "
        f"{answered[1]:.2f}, of those right {right[0]:.2f} → {right[1]:.2f}"
    )
    return Outcome(text, statistics.fmean(after) > statistics.fmean(before))


def _share_right(run: Run, when: str) -> float:
    """Of all attempts: rewards are 1 and -1 for the answer and nothing else."""
    return (run["eval"][when]["reward"] + 1) / 2


def rank_correlation(values: Sequence[float]) -> float | None:
    """Spearman's of values with their place; None where all are alike, of which it does not exist."""
    from scipy.stats import spearmanr

    if len(set(values)) < 2:
        return None
    return float(spearmanr(range(len(values)), values)[0])  # type: ignore[arg-type]


def moving_means(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]


def rising(curve: str) -> Check:
    """A curve without a rank correlation does not rise: it counts as 0."""

    def check(runs: Runs) -> Outcome:
        of = runs["torl"]
        if not of:
            return Outcome(NOT_RUN)
        curves = [run["curves"][curve] for run in of]
        if min(map(len, curves)) < WINDOW + 2:
            return Outcome(f"fewer than {WINDOW + 2} steps")
        found, raw = ([rank_correlation(v) for v in values] for values in (map(moving_means, curves), curves))
        from_to = [ends(run, curve) for run in of]
        start, end = (statistics.fmean(x[i] for x in from_to) for i in (0, 1))
        text = f"{_listed(found)}; of single steps {_listed(raw)}; {start:.2f} → {end:.2f}"
        return Outcome(text, statistics.fmean(x or 0.0 for x in found) > 0.8)

    return check


def _listed(found: Sequence[float | None]) -> str:
    return ", ".join("constant" if x is None else f"{x:.2f}" for x in found)


def correct_pass_more(runs: Runs) -> Outcome:
    if not runs["torl"]:
        return Outcome(NOT_RUN)
    names = ("pass_ratio_correct", "pass_ratio_incorrect")
    right, wrong = (statistics.fmean(x for r in runs["torl"] for x in r["curves"][name]) for name in names)
    return Outcome(f"{right:.3f} and {wrong:.3f}", right > wrong)


def second_call(runs: Runs) -> Outcome:
    from scipy.stats import ttest_1samp

    differences = paired(runs, "c2", "torl", TWO_CALLS)
    if few := _too_few(differences):
        return few
    with_one = statistics.fmean(_accuracy(run, TWO_CALLS) for run in runs["torl"])
    alike = len(set(differences)) == 1  # of which there is no t
    p = float(differences[0] <= 0) if alike else float(ttest_1samp(differences, 0.0, alternative="greater").pvalue)  # type: ignore[attr-defined]
    found = f"{shown(differences, '{:+.3f}')}, p = {p:.3f}, {len(differences)} seeds"
    return Outcome(f"{found}; C = 1 leaves {1 - with_one:.3f} to gain", p < 0.05)


def penalty(runs: Runs) -> Outcome:
    differences = paired(runs, "code_error", "torl")
    if few := _too_few(differences):
        return few
    return Outcome(_gain(differences), _lower(differences) <= 0)
