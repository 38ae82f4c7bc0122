"""The paper in small: runs its arms over several seeds, keeps what they came to as data, and writes docs/reproduction.md of that.

    python tools/reproduce.py [--arms torl no_tool …] [--seeds 1 2 3] [--runs-dir runs/reproduction]      `make reproduce`
    python tools/reproduce.py --fast             two arms, three seeds                                    `make reproduce-fast`
    python tools/reproduce.py --collect-only     data and page of the runs that are complete, without starting any
    python tools/reproduce.py --page-only        the page of the data that is committed

Contract: resumable; a run that is complete in `--runs-dir` is read, one that was stopped goes on from its last checkpoint. A run
that fails is named, the others go on, and the exit code is 1. docs/reproduction/*.json hold one run each, with its settings,
machine and versions as the run itself recorded them (tools/reproduction_data.py); page and figures are made of them alone
(tools/reproduction_page.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reproduction_page
from ablate import run, run_name
from reproduction_data import ARMS, FAST, ROOT, conf_of, recipe_of

from torl_mega.errors import ConfigError
from torl_mega.rollout.python_tool import code_spans
from torl_mega.rollout.recorder import read_groups, step_path
from torl_mega.run.metrics import read_rows
from torl_mega.types import ExecutionStatus, Reward, Trajectory

DATA = ROOT / "docs/reproduction"
CURVES = (
    "accuracy reward code_ratio pass_ratio pass_ratio_correct pass_ratio_incorrect executed_code_ratio code_before_answer_ratio "
    "response_length entropy k3 group_zero_signal_ratio num_trained_tokens rollout_s train_s step_s"
).split()
NUM_EXAMPLES = 3
EDGE = 5  # steps at either end of a run whose trajectories are looked at
_NUMBER = re.compile(r"-?\d+(?:/\d+)?")


@dataclass(frozen=True, slots=True)
class Attempt:
    address: str  # behind the # of the viewer's page
    trajectory: Trajectory
    reward: Reward


def collect(folder: Path, arm: str, seed: int) -> dict[str, Any] | None:
    """What a run came to, as data; None when it is not complete."""
    if not (folder / "summary.json").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text())
    steps = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    last = len(steps) - EDGE
    config = json.loads((folder / "config.json").read_text())["config"]
    return {
        "arm": arm,
        "seed": seed,
        "recipe": recipe_of(config),
        "base_sha256": hashlib.sha256((ROOT / config["model"]["path"] / "model.safetensors").read_bytes()).hexdigest(),
        "versions": json.loads((folder / "versions.json").read_text())[-1],
        "wall_s": round(sum(row["step_s"] for row in steps), 1),
        "total_s": round(summary["wall_s"]["total"], 1),
        "max_abs_logprob_diff": summary["mismatch"]["max_abs_logprob_diff"],
        "curves": {name: [round(row[name], 5) for row in steps] for name in CURVES if name in steps[0]},
        "eval": {when: _rounded(summary["eval"][when]) for when in ("before", "after")},
        "behaviour": {
            "before": behaviour(_attempts(folder, range(EDGE))),
            "after": behaviour(_attempts(folder, range(last, len(steps)))),
        },
    }


def _rounded(measures: dict[str, Any]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in measures.items() if isinstance(value, int | float)}


def _attempts(folder: Path, steps: Iterable[int]) -> list[Attempt]:
    return [
        Attempt(f"step={step}&group={number}&sample={trajectory.sample_index}", trajectory, reward)
        for step in steps
        for number, group in enumerate(read_groups(step_path(folder / "trajectories", step)))
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
    ]


def behaviour(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Counts: answers with a program that failed, those in which another program then ended OK; answers whose number in prose
    before their first program is not what that printed, those whose final answer is what it printed. Of the second and fourth
    kind the first examples, by their address in the viewer's page."""
    counts: dict[str, int] = dict.fromkeys(("answers", "failed", "repaired", "differed", "followed"), 0)
    examples: dict[str, list[dict[str, str]]] = {"repaired": [], "followed": []}
    for attempt in attempts:
        for kind in ("answers", *kinds_of(attempt)):
            counts[kind] += 1
            if kind in examples and len(examples[kind]) < NUM_EXAMPLES:
                problem, text = attempt.trajectory.prompt.problem.problem, attempt.trajectory.response_text
                examples[kind].append({"address": attempt.address, "problem": problem, "text": text})
    return {**counts, "examples": examples}


def kinds_of(attempt: Attempt) -> Iterator[str]:
    trajectory, ran = attempt.trajectory, attempt.trajectory.programs
    first = next((i for i, call in enumerate(ran) if call.status is not ExecutionStatus.OK), None)
    if first is not None:
        yield "failed"
        if any(c.status is ExecutionStatus.OK and c.code != ran[first].code for c in ran[first + 1 :]):
            yield "repaired"
    said, printed = said_before(trajectory), printed_first(trajectory)
    if said is not None and printed is not None and said != printed:
        yield "differed"
        if attempt.reward.extracted == printed:
            yield "followed"


def said_before(trajectory: Trajectory) -> str | None:
    """The last number of the prose before the first program that ran."""
    text = trajectory.turns[0].text
    spans = code_spans(text)
    if not trajectory.turns[0].tool_calls or not spans:
        return None
    found = _NUMBER.findall(text[: spans[0][0]])
    return found[-1] if found else None


def printed_first(trajectory: Trajectory) -> str | None:
    """What the first program printed, if it ended OK and that is a number."""
    ran = trajectory.programs
    if not ran or ran[0].status is not ExecutionStatus.OK:
        return None
    printed = ran[0].observation.strip().removesuffix("```").strip()
    return printed if _NUMBER.fullmatch(printed) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=None, metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/reproduction"))
    parser.add_argument("--fast", action="store_true", help="two arms, three seeds")
    parser.add_argument("--collect-only", action="store_true", help="start nothing")
    parser.add_argument("--page-only", action="store_true", help="read no run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args()
    wanted = FAST if args.fast else {arm: of.seeds for arm, of in ARMS.items()}
    plan = {arm: args.seeds or list(range(1, wanted[arm] + 1)) for arm in args.arms or wanted}
    runs_dir = args.runs_dir.resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    DATA.mkdir(exist_ok=True)
    failed: list[str] = []
    seed_major = sorted((seed, number, arm) for number, (arm, seeds) in enumerate(plan.items()) for seed in seeds)
    try:
        for seed, _, arm in [] if args.page_only else seed_major:
            name = run_name(arm, seed)
            try:
                if not args.collect_only:
                    run(runs_dir, arm, seed, args.overrides, conf_of(arm))
            except ConfigError as exc:  # which every run would meet
                sys.exit(f"reproduce: error: {exc}")
            except subprocess.CalledProcessError as exc:  # what was wrong stands above
                failed.append(f"{name} (exit code {exc.returncode})")
                continue
            found = collect(runs_dir / name, arm, seed)
            if found is not None:
                (DATA / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    finally:  # also of what was there when somebody stopped it
        reproduction_page.write(DATA, ROOT / "docs")
    if failed:
        print(
            f"reproduce: error: did not finish: {', '.join(failed)}; the same command goes on with them",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
