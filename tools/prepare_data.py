"""Cleans data sets into one training file.

    python tools/prepare_data.py --input a.jsonl numina/ deepscaler.json --eval torl_test.parquet --out train.parquet

Reads ToRL/verl parquet, jsonl, json and folders of local HF data sets (NuminaMath, MATH, DeepScaleR formats). Drops proofs,
golds that cannot be checked, repeats, and whatever stands in an evaluation set. Writes

    train.parquet         ToRL/verl format, 1,024 rows a row group
    train.manifest.json   inputs with hashes, counts per source and reason, settings
    train.dropped.jsonl   one line per dropped row: file, row, reason, detail

A broken row is reported with file and row and skipped. Input is streamed; what is kept per row is 8 bytes. A run that was
interrupted goes on where it stopped when it is started again with the same arguments (`<out>.work/` holds its state).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torl_mega.data.cleaning import NGRAM, Benchmarks, fingerprint, limr_scores, refusal
from torl_mega.data.problem_files import load_problems
from torl_mega.data.readers import Row, place, read_rows, to_problem
from torl_mega.errors import DataError, TorlError
from torl_mega.run.files import write_json
from torl_mega.types import Problem

ROWS_PER_GROUP = 1024
_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".arrow")
_IGNORED = ("dataset_info.json", "state.json", "dataset_dict.json")


@dataclass
class State:
    """What a resumed run needs: where it was, what it counted, which problems it has seen."""

    file: int = 0  # index of the input file
    row: int = 0  # rows of it that are done
    kept: int = 0
    parts: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    dropped_bytes: int = 0
    seen: dict[int, str] = field(default_factory=dict)  # fingerprint -> gold


def input_files(paths: list[Path]) -> list[Path]:
    """The data files behind `paths`, folders searched in name order. Raises DataError for a path that holds none."""
    files: list[Path] = []
    for path in paths:
        found = (
            [path]
            if path.is_file()
            else sorted(p for p in path.rglob("*") if p.suffix in _ENDINGS and p.name not in _IGNORED)
        )
        if not found:
            raise DataError(f"{path}: no such file, or a folder without {', '.join(_ENDINGS)} in it")
        files += found
    return files


class Preparation:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = args.out
        self.work = args.out.with_name(args.out.name + ".work")
        own = {p.resolve() for p in (self.out, self.work, self.out.with_suffix(".manifest.json"), _dropped(self.out))}
        self.files = [f for f in input_files(args.input) if not own & {f.resolve(), f.resolve().parent}]
        self.dropped_path = self.work / "dropped.jsonl"
        evaluation = [problem for path in args.eval for problem in load_problems(str(path))]
        self.benchmarks = Benchmarks(evaluation, ngram=args.ngram)
        self.chosen = chosen_by_curves(args.curves, args.limr_threshold) if args.curves else None
        self.settings = {
            "files": {str(f): file_hash(f) for f in self.files},
            "eval": {str(f): file_hash(f) for f in args.eval},
            "curves": file_hash(args.curves) if args.curves else None,
            "limr_threshold": args.limr_threshold if args.curves else None,
            "ngram": args.ngram,
            "seed": args.seed,
        }
        self.state = self._resume()

    def run(self) -> dict[str, Any]:
        """Does all files from where the state stands, then merges the parts. Returns the manifest."""
        rows: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []
        for index in range(self.state.file, len(self.files)):
            path = self.files[index]
            for number, row in read_rows(path):
                if index == self.state.file and number < self.state.row:
                    continue
                self.state.file, self.state.row = index, number + 1
                self.state.counts["read"] += 1
                kept, why = self._judge(path, number, row)
                if kept is not None:
                    rows.append(kept)
                if why is not None:
                    dropped.append(why)
                if len(rows) + len(dropped) >= self.args.chunk:
                    self._commit(rows, dropped)
                    rows, dropped = [], []
            self.state.file, self.state.row = index + 1, 0
        self._commit(rows, dropped)
        return self._finish()

    def _judge(self, path: Path, number: int, row: Row | str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(row to keep, None) or (None, why it was dropped)."""

        def drop(reason: str, detail: str = "") -> tuple[None, dict[str, Any]]:
            self.state.counts[reason] += 1
            if reason == "broken":
                print(detail, file=sys.stderr)
            return None, {"file": str(path), "row": number, "reason": reason, "detail": detail}

        if isinstance(row, str):
            return drop("broken", f"{place(path, number)}: {row}")
        try:
            problem = to_problem(row, path=path, number=number)
        except DataError as exc:
            proof = "no answer" in str(exc) and "proof" in {
                str(row.get(k, "")).lower() for k in ("problem_type", "question_type")
            }
            return drop("proof" if proof else "broken", str(exc))
        reason = refusal(problem, row)
        if reason is not None:
            return drop(reason, problem.answer[:200])
        hit = self.benchmarks.match(problem.problem)
        if hit is not None:
            return drop("contaminated", f"{hit[0]}: {hit[1]}")
        if self.chosen is not None and problem.problem_id not in self.chosen:
            return drop("not_selected")
        key = fingerprint(problem.problem)
        if key in self.state.seen:
            return drop(
                "duplicate" if self.state.seen[key] == problem.answer else "duplicate_other_answer",
                problem.answer[:200],
            )
        self.state.seen[key] = problem.answer
        self.state.sources[problem.source] += 1
        return verl_row(problem), None

    # ------------------------------------------------------------ state on disk

    def _resume(self) -> State:
        """The state of an interrupted run with the same settings; a fresh one otherwise."""
        path = self.work / "state.json"
        if not path.exists():
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            return State()
        saved = json.loads(path.read_text())
        if saved.pop("settings") != self.settings:
            raise DataError(f"{self.work}: belongs to a run with other inputs or settings; remove it to start over")
        state = State(**{**saved, "counts": Counter(saved["counts"]), "sources": Counter(saved["sources"])})
        for part in range(state.parts):
            for row in pq.read_table(self._part(part), columns=["prompt", "reward_model"]).to_pylist():
                state.seen[fingerprint(row["prompt"][-1]["content"])] = row["reward_model"]["ground_truth"]
        with self.dropped_path.open("ab") as out:
            out.truncate(state.dropped_bytes)  # what was written after the last commit is written again
        return state

    def _commit(self, rows: list[dict[str, Any]], dropped: list[dict[str, Any]]) -> None:
        """Part file, list of dropped rows and state, in an order in which a kill leaves a consistent state behind."""
        if rows:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), self._part(self.state.parts))
            self.state.parts += 1
            self.state.kept += len(rows)
        with self.dropped_path.open("ab") as out:
            out.write(
                "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in dropped).encode("utf-8", "backslashreplace")
            )
            self.state.dropped_bytes = out.tell()
        saved = {
            k: getattr(self.state, k) for k in ("file", "row", "kept", "parts", "counts", "sources", "dropped_bytes")
        }
        write_json(self.work / "state.json", {**saved, "settings": self.settings})

    def _part(self, number: int) -> Path:
        return self.work / f"part-{number:06d}.parquet"

    def _finish(self) -> dict[str, Any]:
        if not self.state.kept:
            raise DataError(f"none of the {self.state.counts['read']} rows is left; see {self.dropped_path}")
        temporary = self.work / "merged.parquet"
        with pq.ParquetWriter(temporary, SCHEMA) as writer:
            for table in self._merged():
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        counts = dict(self.state.counts)
        manifest = {
            "rows": self.state.kept,
            "sha256": file_hash(temporary),
            "read": counts.pop("read"),
            "dropped": counts,
            "sources": dict(self.state.sources),
            **self.settings,
        }
        manifest_path = self.out.with_suffix(".manifest.json")
        manifest_path.with_suffix(".tmp").write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(self.dropped_path, _dropped(self.out))
        os.replace(temporary, self.out)
        os.replace(manifest_path.with_suffix(".tmp"), manifest_path)
        shutil.rmtree(self.work)
        return manifest

    def _merged(self) -> Iterator[pa.Table]:
        """The parts as tables of whole row groups."""
        waiting: list[pa.Table] = []
        for part in range(self.state.parts):
            waiting.append(pq.read_table(self._part(part), schema=SCHEMA))
            rows = sum(t.num_rows for t in waiting)
            if rows >= ROWS_PER_GROUP:
                table = pa.concat_tables(waiting).combine_chunks()
                whole = rows - rows % ROWS_PER_GROUP
                yield table.slice(0, whole)
                waiting = [table.slice(whole)] if whole < rows else []
        if waiting:
            yield pa.concat_tables(waiting).combine_chunks()


SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("id", pa.string()), ("split", pa.string())])),
    ]
)


def _dropped(out: Path) -> Path:
    return out.with_suffix(".dropped.jsonl")


def verl_row(problem: Problem) -> dict[str, Any]:
    """The problem in ToRL/verl format: the bare problem as the user's message, templated when it is trained on."""
    return {
        "data_source": problem.source,
        "prompt": [{"role": "user", "content": problem.problem}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"id": problem.problem_id, "split": "train"},
    }


def chosen_by_curves(path: Path, threshold: float) -> set[str]:
    """Ids of problems whose learning curve has a LIMR score above `threshold`.

    `path`: jsonl of {"problem_id", "rewards": [mean reward in [0, 1] per epoch]}.
    """
    curves: dict[str, list[float]] = {}
    for number, row in read_rows(path):
        if isinstance(row, str) or not isinstance(row.get("rewards"), list) or "problem_id" not in row:
            raise DataError(f"{place(path, number)}: expected an object with problem_id and rewards")
        curves[str(row["problem_id"])] = [float(r) for r in row["rewards"]]
    try:
        return {i for i, score in limr_scores(curves).items() if score > threshold}
    except ValueError as exc:
        raise DataError(f"{path}: {exc}") from None


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="data files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="the parquet file to write")
    parser.add_argument(
        "--eval", type=Path, nargs="*", default=[], help="evaluation sets that must not leak into training"
    )
    parser.add_argument("--ngram", type=int, default=NGRAM, help="words in a row that make a contamination hit")
    parser.add_argument("--curves", type=Path, help="learning curves for LIMR selection, jsonl")
    parser.add_argument("--limr-threshold", type=float, default=0.6, help="least alignment score (LIMR: 0.6)")
    parser.add_argument(
        "--seed", type=int, default=0, help="recorded in the manifest; the order of rows is that of the input"
    )
    parser.add_argument("--chunk", type=int, default=4096, help="rows between two saved states")
    args = parser.parse_args(argv)
    try:
        manifest = Preparation(args).run()
    except TorlError as exc:
        print(f"prepare_data: {exc}", file=sys.stderr)
        return 1
    print(json.dumps(manifest, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
