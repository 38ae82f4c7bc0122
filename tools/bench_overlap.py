"""What sampling ahead saves and whether it costs accuracy: the quickstart, synchronous and one step off, side by side.

    python tools/bench_overlap.py [--seeds 1 2 3] [--staleness 1] [--runs-dir runs/overlap] [a.b=value ...]

Trains conf/quickstart.yaml twice per seed. A step's time is the median over all steps but the first; the bound that is
printed is 1.1 x max(rollout, train) + sync of the synchronous run, what overlap can reach on a machine with room for both.
On two cores rollout and training share them, so the sum of both is the other number to look at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from torl_mega.run.metrics import read_rows

PARTS = ("rollout_s", "train_s", "sync_s", "step_s")


def run(runs_dir: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Trains (or finds) one run: medians of its parts and its final accuracy."""
    command = [str(Path(sys.executable).with_name("torl")), "train", "conf/quickstart.yaml"]
    subprocess.run([*command, f"runs_dir={runs_dir}", f"name={name}", *overrides], check=True, stdout=sys.stderr)
    rows = [row for row in read_rows(runs_dir / name / "metrics.jsonl") if row["kind"] == "train"][1:]
    summary = json.loads((runs_dir / name / "summary.json").read_text())
    medians = {part: statistics.median(row[part] for row in rows) for part in PARTS}
    return {**medians, "accuracy": summary["eval"]["after"]["accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/overlap"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args()
    print("| seed | accuracy | ahead | rollout | train | sync | step | step ahead | bound | ahead / sync |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        runs = [
            run(args.runs_dir, f"seed{seed}_{k}", [f"seed={seed}", f"rollout.max_staleness={k}", *args.overrides])
            for k in (0, args.staleness)
        ]
        now, ahead = runs
        bound = 1.1 * max(now["rollout_s"], now["train_s"]) + now["sync_s"]
        cells = [f"{now['accuracy']:.3f}", f"{ahead['accuracy']:.3f}", *(f"{now[part]:.2f} s" for part in PARTS)]
        cells += [f"{ahead['step_s']:.2f} s", f"{bound:.2f} s", f"{ahead['step_s'] / now['step_s']:.2f}x"]
        print(f"| {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
