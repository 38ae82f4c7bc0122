"""Regrades answers with both checkers and lists where they disagree, with each other or with what was recorded.

    python tools/grade.py runs/NAME                                       every recorded trajectory of a run
    python tools/grade.py runs/NAME/trajectories/step_00003.jsonl.zst     of one step
    python tools/grade.py pairs.jsonl                                     {"gold", "answer"}; "problem" and "expected" if known
    python tools/grade.py pairs.jsonl --also theirs:is_equal              a further grader, pkg.module:function

Prints one JSON object a line for each answer on which `own`, `math_verify`, `--also`'s function (answer, gold) -> bool and
the recorded verdict (or the label) are not all the same, and last one with the counts: answers, right by each, timeouts,
and for labelled files precision and recall. The function is called in this process, without a time limit; what it raises
counts as `fault`.
Answers without a final box are left out. Exit code 0 also where there are disagreements.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torl_mega.data.readers import parse_line
from torl_mega.errors import ConfigError, DataError, TorlError
from torl_mega.import_path import is_import_path, load
from torl_mega.reward.grader import Grader, Verdict
from torl_mega.rollout.recorder import read_rows

CHECKERS = ("own", "math_verify")


def recorded(path: Path) -> Iterator[dict[str, Any]]:
    """(problem, gold, answer, expected) of the recorded trajectories of a run folder or a step file."""
    folder = path / "trajectories" if (path / "trajectories").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.glob("step_*.jsonl.zst"))
    if not files:
        raise DataError(
            f"{folder} holds no step_*.jsonl.zst; give a run folder, a step file or a .jsonl of gold and answer"
        )
    for file in files:
        for row in read_rows(file):
            reward = row["reward"]
            if reward["extracted"] is not None:
                known = {"expected": reward["correct"], "problem_id": row["problem_id"], "step": row["step"]}
                yield {"problem": row["problem"], "gold": row["answer"], "answer": reward["extracted"], **known}


def listed(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file of gold and answer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            row = parse_line(line)
            if isinstance(row, str) or not {"gold", "answer"} <= set(row):
                wrong = row if isinstance(row, str) else "a row without gold or answer"
                raise DataError(
                    f"{path}:{number}: {wrong}; expected {{gold, answer}} and if known problem and expected"
                )
            yield dict(row)


async def verdicts(rows: list[dict[str, Any]], checker: str, args: argparse.Namespace) -> tuple[list[Verdict], float]:
    grader = Grader(args.workers, args.timeout_s, checker=checker)
    await grader.start()
    try:
        start = time.perf_counter()
        found = await asyncio.gather(*(grader.check(r["answer"], r["gold"], r.get("problem", "")) for r in rows))
        return list(found), time.perf_counter() - start
    finally:
        await grader.close()


def theirs(rows: list[dict[str, Any]], source: str) -> tuple[list[Verdict], float]:
    """What `pkg.module:function` says of each (answer, gold), and the seconds it took."""
    if not is_import_path(source):
        raise ConfigError(f"--also {source}: no import path; expected pkg.module:function")
    grade = load(source, "--also")
    found = []
    start = time.perf_counter()
    for row in rows:
        try:
            found.append(Verdict.RIGHT if grade(row["answer"], row["gold"]) else Verdict.WRONG)
        except Exception as exc:
            print(f"{source}({row['answer']!r}, {row['gold']!r}) raised {exc!r}", file=sys.stderr)
            found.append(Verdict.FAULT)
    return found, time.perf_counter() - start


def summary(rows: list[dict[str, Any]], found: list[Verdict], wall_s: float) -> dict[str, Any]:
    right = [v is Verdict.RIGHT for v in found]
    counts: dict[str, Any] = {
        "right": sum(right),
        "timeout": found.count(Verdict.TIMEOUT),
        "fault": found.count(Verdict.FAULT),
        "answers_per_s": round(len(rows) / wall_s, 1) if wall_s else None,
    }
    labels = [r.get("expected") for r in rows]
    if rows and None not in labels:
        true_right = sum(v and bool(e) for v, e in zip(right, labels, strict=True))
        counts["wrongly_right"] = sum(right) - true_right
        counts["precision"] = round(true_right / sum(right), 4) if any(right) else None
        counts["recall"] = round(true_right / sum(map(bool, labels)), 4) if any(labels) else None
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a run folder, a step_*.jsonl.zst, or a .jsonl of {gold, answer}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=5.0)
    parser.add_argument("--also", metavar="pkg.module:function", help="a further grader, (answer, gold) -> bool")
    args = parser.parse_args()
    try:
        rows = list(listed(args.file) if args.file.suffix == ".jsonl" else recorded(args.file))
        results = {checker: asyncio.run(verdicts(rows, checker, args)) for checker in CHECKERS}
        if args.also:
            results[args.also] = theirs(rows, args.also)
    except (TorlError, OSError) as exc:
        sys.exit(f"error: {exc}")
    for number, row in enumerate(rows):
        said = {checker: str(results[checker][0][number]) for checker in results}
        known = [] if "expected" not in row else ["right" if row["expected"] else "wrong"]
        if len({*said.values(), *known}) > 1:
            print(json.dumps({**said, **row}, ensure_ascii=False))
    counts = {checker: summary(rows, *found) for checker, found in results.items()}
    print(json.dumps({"answers": len(rows), **counts}))


if __name__ == "__main__":
    main()
