"""Which option helps: the quickstart under every one of them, over several seeds, as one table and one plot.

    python tools/ablate.py [--seeds 1 2 3] [--arms default refill …] [--runs-dir runs/ablation] [--png FILE] [a.b=value …]
    python tools/ablate.py --list            the arms and their overrides
    python tools/ablate.py --table-only      of what is known, without starting any

Resumable: a run that is complete is read, one that was stopped goes on, and `torl train` refuses a folder of another recipe.
What a run came to is kept in `--results` (docs/ablation.jsonl), a line for each arm and seed with its overrides and versions, so
that its folder may go and another machine may go on; a line whose overrides are not those asked for is run again. `--doc FILE`
puts the table of all that is known between the marks `<!-- ablation -->` and `<!-- /ablation -->`. Per arm: the first step from
which the mean training accuracy of three steps reaches 0.85 (runs that never do count as `num_steps`, and are told), and the
evaluation after the last step, each as mean and 95 % interval over seeds (Student's t; with one seed there is none).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError
from torl_mega.run.folder import RunFolder, is_complete, other_recipe
from torl_mega.run.metrics import read_rows
from torl_mega.run.versions import versions

ROOT = Path(__file__).resolve().parents[1]
TARGET, WINDOW = 0.85, 3
MARKS = ("<!-- ablation -->", "<!-- /ablation -->")
STALE = "rollout.max_staleness"
ARMS: dict[str, list[str]] = {
    "default": [],
    "two updates a step": ["trainer.mini_batch_samples=128"],
    "C = 0": ["rollout.max_tool_calls=0"],
    "C = 2": ["rollout.max_tool_calls=2"],
    "code error -0.5 on reward": ["reward.code_error=-0.5"],
    "code error -0.5 on advantage": ["reward.code_error=-0.5", "algo.penalties=advantage"],
    "Dr. GRPO": ["algo.advantage=dr_grpo", "algo.loss_agg=seq_mean_token_sum_norm"],
    "RLOO": ["algo.advantage=rloo"],
    "REINFORCE++": ["algo.advantage=reinforce_pp"],
    "batch std": ["algo.advantage=batch_std"],
    "clip-higher, two updates": ["algo.clip_high=0.28", "trainer.mini_batch_samples=128"],
    "signal only": ["algo.zero_signal=drop"],
    "refill": ["algo.zero_signal=refill"],
    "GSPO, two updates": ["algo.loss=gspo", "algo.loss_agg=seq_mean_token_mean", "algo.clip_low=0.0003",
                          "algo.clip_high=0.0004", "trainer.mini_batch_samples=128"],
    "CISPO, two updates": ["algo.loss=cispo", "algo.clip_low=1.0", "algo.clip_high=2.0", "trainer.mini_batch_samples=128"],
    "RoC": ["rollout.attempts_per_prompt=32"],
    "one step ahead": [f"{STALE}=1"],
    "one step ahead, uncorrected": [f"{STALE}=1", "algo.correction=none"],
    "four steps ahead": [f"{STALE}=4"],
    "four steps ahead, uncorrected": [f"{STALE}=4", "algo.correction=none"],
    "plus": [],  # conf/plus.yaml's differences from base.yaml, see `arms`
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    accuracies: tuple[float, ...]  # of each step's training attempts
    final: float

    @property
    def first_at_target(self) -> int | None:
        """The first step from which `WINDOW` steps have a mean of `TARGET`, counted from 1."""
        means = [statistics.fmean(self.accuracies[i : i + WINDOW]) for i in range(len(self.accuracies) - WINDOW + 1)]
        return next((i + 1 for i, mean in enumerate(means) if mean >= TARGET), None)

    @property
    def steps_to_target(self) -> int:
        return self.first_at_target or len(self.accuracies)

    @property
    def reached(self) -> bool:
        return self.first_at_target is not None


class Results:
    """What is known of (arm, seed), as lines of a file; the last line on one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}

    def get(self, arm: str, seed: int, overrides: Sequence[str] | None = None) -> Outcome | None:
        """What a run came to; with `overrides`, only one of exactly those."""
        row = self._known.get((arm, seed))
        if row is None or (overrides is not None and row["overrides"] != list(overrides)):
            return None
        return Outcome(tuple(row["accuracies"]), row["final"])

    def outcomes(self) -> dict[str, list[Outcome]]:
        """Everything, arm by arm in the order of `ARMS`, seed by seed."""
        found: dict[str, list[Outcome]] = {arm: [] for arm in ARMS}
        for arm, seed in sorted(self._known):
            found[arm] += filter(None, [self.get(arm, seed)])
        return {arm: outcomes for arm, outcomes in found.items() if outcomes}

    def add(self, arm: str, seed: int, overrides: Sequence[str], outcome: Outcome, versions: Mapping[str, Any]) -> None:
        accuracies = [round(a, 4) for a in outcome.accuracies]
        row = {"arm": arm, "seed": seed, "overrides": list(overrides), "final": outcome.final, "accuracies": accuracies}
        self._known[arm, seed] = row | {"versions": dict(versions)}
        known = sorted(self._known.values(), key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
        self.path.write_text("".join(json.dumps(row) + "\n" for row in known))


def arms() -> dict[str, list[str]]:
    """Every arm's overrides."""
    plus, base = (load_config(ROOT / "conf" / name).model_dump(mode="json") for name in ("plus.yaml", "base.yaml"))
    evaluation_is_the_same = {k: v for k, v in plus.items() if k not in ("name", "eval")}
    return {**ARMS, "plus": list(_differences(base, evaluation_is_the_same))}


def _differences(base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in other.items():
        if isinstance(value, dict):
            yield from _differences(base[key], value, f"{prefix}{key}.")
        elif value != base[key]:
            yield f"{prefix}{key}={json.dumps(value)}"


def run(runs_dir: Path, arm: str, seed: int, overrides: Sequence[str], conf: str = "conf/quickstart.yaml") -> None:
    """Trains one run of `conf`, or goes on with it, or finds it complete; a folder with another recipe in it is refused."""
    command = [str(Path(sys.executable).with_name("torl")), "train", conf]
    mine = [f"runs_dir={runs_dir}", f"name={run_name(arm, seed)}", f"seed={seed}", "checkpoint.export_hf=false"]
    config = load_config(ROOT / conf, [*mine, *overrides])
    folder = RunFolder.of(config)
    if not is_complete(folder, config) or other_recipe(folder, config):
        subprocess.run([*command, *mine, *overrides], check=True, stdout=sys.stderr, cwd=ROOT)


def run_name(arm: str, seed: int) -> str:
    return "".join(c if c.isalnum() else "_" for c in arm) + f"__seed{seed}"


def read(folder: Path) -> Outcome | None:
    """What a run came to; None when it is not complete."""
    if not (folder / "summary.json").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text())
    accuracies = tuple(row["accuracy"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train")
    return Outcome(accuracies, summary["eval"]["after"]["accuracy"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (not a number with one value)."""
    if len(values) < 2:
        return values[0], math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def table(found: Mapping[str, Sequence[Outcome]]) -> str:
    lines = [f"| arm | seeds | steps to {TARGET} | final accuracy | against default |", "|---|---|---|---|---|"]
    baseline = statistics.fmean(o.final for o in found["default"]) if found.get("default") else None
    for arm, outcomes in found.items():
        missed = sum(not o.reached for o in outcomes)
        steps, final = interval([o.steps_to_target for o in outcomes]), interval([o.final for o in outcomes])
        never = f" ({missed} never)" if missed else ""
        change = "" if baseline is None or arm == "default" else f"{final[0] - baseline:+.3f}"
        lines.append(f"| {arm} | {len(outcomes)} | {_shown(steps, '.1f')}{never} | {_shown(final, '.3f')} | {change} |")
    absent = [arm for arm in ARMS if not found.get(arm)]
    return "\n".join(lines) + (f"\n\nNot run: {', '.join(absent)}." if absent else "")


def _shown(value: tuple[float, float], form: str) -> str:
    return format(value[0], form) + ("" if math.isnan(value[1]) else f" ± {format(value[1], form)}")


def write_doc(page: Path, shown: str) -> None:
    before, mark, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        sys.exit(f"error: {page} has no marks {' … '.join(MARKS)}")
    page.write_text(f"{before}{mark}\n{shown}\n{end}{after}")


def plot(found: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Training accuracy by step, one panel per arm over the default's curve; the band spans the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.4 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, arm in zip(axes.flat, found, strict=False):
        axis.set_title(arm, fontsize=8)
        for name, colour in (("default", "0.6"), (arm, "tab:blue")):
            curves = list(zip(*(o.accuracies for o in found.get(name, ())), strict=False))
            if curves:
                axis.plot([statistics.fmean(step) for step in curves], color=colour)
                axis.fill_between(
                    range(len(curves)), [min(c) for c in curves], [max(c) for c in curves], color=colour, alpha=0.2
                )
    figure.supxlabel("step")
    figure.supylabel("training accuracy")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs/ablation.jsonl", help="where outcomes are kept")
    parser.add_argument("--png", type=Path, help="where to draw the curves")
    parser.add_argument("--doc", type=Path, help="a page that shows the table between its marks")
    parser.add_argument("--list", action="store_true", help="print the arms and their overrides")
    parser.add_argument("--table-only", action="store_true", help="start nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args()
    chosen = {arm: overrides for arm, overrides in arms().items() if arm in args.arms}
    if args.list:
        print("\n".join(f"{arm}: {' '.join(overrides)}" for arm, overrides in chosen.items()))
        return
    results = Results(args.results)
    if not args.table_only:
        for seed, (arm, overrides) in itertools.product(args.seeds, chosen.items()):
            overrides = [*overrides, *args.overrides]
            if results.get(arm, seed, overrides) is None:
                folder = args.runs_dir.resolve() / run_name(arm, seed)
                try:
                    run(folder.parent, arm, seed, overrides)
                except (ConfigError, subprocess.CalledProcessError) as exc:
                    sys.exit(f"ablate: error: {folder.name}: {exc}; the same command goes on there")
                outcome = read(folder)
                assert outcome is not None
                results = Results(args.results)  # another seed may have ended meanwhile
                results.add(arm, seed, overrides, outcome, versions())
    found = {arm: [o for s in args.seeds if (o := results.get(arm, s))] for arm in chosen}
    found = {arm: outcomes for arm, outcomes in found.items() if outcomes}
    print(table(found))
    if args.png and found:
        plot(found, args.png)
    if args.doc:
        write_doc(args.doc, table(results.outcomes()))


if __name__ == "__main__":
    main()
