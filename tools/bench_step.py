"""Where each second of a step goes, ours beside TRL's: the quickstart's model and prompts, on one machine in one run.

    make trl                                             # TRL's environment, build/trl
    python tools/bench_step.py [--rounds 3] [--steps 10] [--png docs/img/step.png]

Both sample 16 x 16 answers without the tool and train on them; the runs alternate, and the first two steps of each are
warm-up. With the tool there is ours alone: TRL's tools speak through a chat template, which this model does not have.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.data.prompts import PromptSource, plain_prompts
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.run.metrics import read_rows

CONF = "conf/quickstart.yaml"
TRL = Path("build/trl/bin/python")
PARTS = ("rollout_s", "train_s", "sync_s")
WARM_UP = 2
ONLY_STEPS = ("eval.max_problems=16", "eval.every_steps=0", "checkpoint.every_steps=0")
Step = dict[str, float]


def ours(runs_dir: Path, name: str, steps: int, calls: int) -> list[Step]:
    """`torl train` with `calls` tool calls an answer."""
    command = [str(Path(sys.executable).with_name("torl")), "train", CONF, f"runs_dir={runs_dir}", f"name={name}"]
    command += [f"num_steps={steps}", f"rollout.max_tool_calls={calls}", *ONLY_STEPS]
    subprocess.run(command, check=True, stdout=sys.stderr, env=_environment())
    rows = [row for row in read_rows(runs_dir / name / "metrics.jsonl") if row["kind"] == "train"]
    return [{part: row[part] for part in PARTS} for row in rows]


def trl(scratch: Path, steps: int) -> list[Step]:
    config = load_config(CONF)
    settings = {
        "model": config.model.path,
        "prompts": _prompts(config, steps * config.rollout.prompts_per_step),
        "group_size": config.rollout.group_size,
        "max_response_tokens": config.rollout.max_response_tokens,
        "temperature": config.rollout.temperature,
        "lr": config.optim.lr,
        "steps": steps,
    }
    path = scratch / "trl.json"
    path.write_text(json.dumps(settings))
    command = [str(TRL), str(Path(__file__).with_name("bench_step_trl.py")), str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment())
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rollout_s"')]
    assert len(found) == steps, done.stdout[-2000:]
    return [{**step, "sync_s": 0.0} for step in found]


def _prompts(config: Config, count: int) -> list[dict[str, str]]:
    tokenizer = Tokenizer(config.model.path)
    prompts = PromptSource(config.data, plain_prompts(config.data.template, tokenizer.encode), seed=config.seed).next(
        count
    )
    return [{"prompt": tokenizer.decode(p.token_ids), "gold": p.problem.answer} for p in prompts]


def _environment() -> dict[str, str]:
    """Threads as each program chooses them."""
    return {**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, "HF_HUB_OFFLINE": "1"}


def measure(rounds: int, steps: int) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    if not TRL.exists():
        print(f"TRL IS SKIPPED: {TRL} is not there; `make trl` installs it", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for turn in range(rounds):
            if TRL.exists():
                found.setdefault("TRL, C = 0", []).extend(trl(scratch, steps)[WARM_UP:])
            for calls in (0, 1):
                measured = ours(scratch / "runs", f"c{calls}_{turn}", steps, calls)
                found.setdefault(f"ours, C = {calls}", []).extend(measured[WARM_UP:])
    return found


def medians(steps: Sequence[Step]) -> Step:
    """Of each part, and of the whole step."""
    return {part: statistics.median(s[part] for s in steps) for part in PARTS} | {
        "step_s": statistics.median(sum(s.values()) for s in steps)
    }


def report(found: dict[str, list[Step]]) -> dict[str, Step]:
    rows = {name: medians(steps) for name, steps in found.items()}
    print("| | rollout | train | verified sync | step | fastest .. slowest |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        whole = [sum(step.values()) for step in found[name]]
        cells = [f"{row[part]:.2f} s" for part in (*PARTS, "step_s")]
        print(f"| {name} | {' | '.join(cells)} | {min(whole):.2f} .. {max(whole):.2f} s |")
    if "TRL, C = 0" in rows:
        print(f"ours / TRL, C = 0: {rows['ours, C = 0']['step_s'] / rows['TRL, C = 0']['step_s']:.2f}")
    return rows


def plot(rows: dict[str, Step], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 2.4))
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for part, label in zip(PARTS, ("rollout", "train", "verified sync"), strict=True):
        widths = [rows[name][part] for name in names]
        axes.barh(names, widths, left=left, label=label)
        left = list(itertools.starmap(float.__add__, zip(left, widths, strict=True)))
    axes.set_xlabel("seconds of a step, medians")
    axes.legend(frameon=False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of each run, warm-up included")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} are warm-up, give more")
    rows = report(measure(args.rounds, args.steps))
    if args.png:
        plot(rows, args.png)


if __name__ == "__main__":
    main()
