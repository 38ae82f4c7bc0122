"""Opens problems: a file for random access, what a user's function yields, or a generator.

    spec ─► arithmetic:SEED        generated, endless
            pkg.module:function    called without arguments; yields rows or `Problem`s
            a path                 a file in one of the formats of readers.py, or what data.source makes of it

Parquet and .jsonl files are read lazily, a group of rows at a time, so they may be larger than memory; .json and .arrow files are
held whole, and what a user's function yields is kept.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torl_mega.config import ColumnsConfig
from torl_mega.data import arithmetic
from torl_mega.data.readers import Row, has_columns, parse_line, place, read_rows, to_problem
from torl_mega.errors import DataError
from torl_mega.import_path import is_import_path, load
from torl_mega.types import Problem

_CACHED_GROUPS = 8


def load_problems(spec: str, *, max_problems: int | None = None, columns: ColumnsConfig | None = None) -> list[Problem]:
    """The first `max_problems` of `spec` (all when None) in memory, for evaluation. `columns` counts where a file has them all.

    Raises DataError for a missing, unknown, empty or broken file, and for `arithmetic:SEED` without `max_problems`,
    because that one never ends.
    """
    seed = arithmetic_seed(spec)
    if seed is not None:
        if max_problems is None:
            raise DataError(f"{spec} never ends; say how many with eval.max_problems")
        return list(itertools.islice(arithmetic.problems(seed), max_problems))
    if is_own(spec):
        problems = list(itertools.islice(_own_problems(spec, (), columns, "eval.data"), max_problems))
    else:
        path = Path(spec)
        rows = list(itertools.islice(read_rows(path), max_problems))
        if columns and rows and not (isinstance(rows[0][1], Mapping) and has_columns(rows[0][1], columns)):
            columns = None
        problems = [_checked(row, path=path, number=number, columns=columns) for number, row in rows]
    if not problems:
        raise DataError(f"{spec}: no problems in it")
    return problems


def arithmetic_seed(spec: str) -> int | None:
    kind, colon, seed = spec.partition(":")
    if kind != "arithmetic" or not colon:
        return None
    if not seed.isdigit():
        raise DataError(f"{spec}: expected arithmetic:SEED with a whole number, as in arithmetic:1")
    return int(seed)


def is_own(spec: str) -> bool:
    """Whether `spec` names a user's function that yields problems."""
    return is_import_path(spec) and not spec.startswith("arithmetic:")


def is_missing(spec: str) -> bool:
    """Whether `spec` is to be a file and is not there."""
    return not is_own(spec) and not spec.startswith("arithmetic:") and not Path(spec).exists()


class ProblemFile(Protocol):
    """A data file as a sequence of problems, every row checked when it was opened."""

    digest: str  # of every problem and answer, in order

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Problem: ...

    def __iter__(self) -> Iterator[Problem]: ...


def open_problems(spec: str, columns: ColumnsConfig | None = None, *, source: str | None = None) -> ProblemFile:
    """The problems of `spec` for random access. Reads them once, row by row; raises DataError at the first broken row.

    `source`: `pkg.module:function`, called with `spec`, instead of a reader of ours.
    """
    if source is not None:
        return _MemoryFile(_own_problems(source, (spec,), columns, "data.source"), name=f"{source}({spec!r})")
    if is_own(spec):
        return _MemoryFile(_own_problems(spec, (), columns, "data.train"), name=spec)
    path = Path(spec)
    if path.suffix == ".parquet":
        return _ParquetFile(path, columns)
    if path.suffix in (".jsonl", ".ndjson"):
        return _LinesFile(path, columns)
    rows = read_rows(path)
    return _MemoryFile((_checked(row, path=path, number=n, columns=columns) for n, row in rows), name=spec)


class _MemoryFile:
    """What cannot be read in pieces: .json, .arrow of a saved data set, a user's function."""

    def __init__(self, problems: Iterable[Problem], *, name: str) -> None:
        self._problems = list(problems)
        if not self._problems:
            raise DataError(f"{name}: no problems in it")
        self.digest = _digest(self._problems)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, row: int) -> Problem:
        return self._problems[row]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems)


class _LinesFile:
    """A .jsonl file: the offset of each line is kept, the lines are read when asked for."""

    def __init__(self, path: Path, columns: ColumnsConfig | None) -> None:
        self._path, self._columns = path, columns
        self.digest = _digest(iter(self))
        lines, offsets, at = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    lines.append(number)
                    offsets.append(at)
                at += len(line)
        if not lines:
            raise DataError(f"{path}: no problems in it")
        self._lines, self._offsets = np.array(lines, dtype=np.int64), np.array(offsets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> Problem:
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[row]))
            return _checked(
                parse_line(file.readline()), path=self._path, number=int(self._lines[row]), columns=self._columns
            )

    def __iter__(self) -> Iterator[Problem]:
        return (
            _checked(row, path=self._path, number=number, columns=self._columns)
            for number, row in read_rows(self._path)
        )


class _ParquetFile:
    """A .parquet file: row groups are decoded when asked for, the last few are kept."""

    def __init__(self, path: Path, columns: ColumnsConfig | None) -> None:
        import pyarrow.parquet as pq

        self._path, self._columns = path, columns
        self.digest = _digest(iter(self))
        self._file = pq.ParquetFile(path)
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = [0, *itertools.accumulate(sizes)]
        if not self._starts[-1]:
            raise DataError(f"{path}: no problems in it")
        self._group = lru_cache(maxsize=_CACHED_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Problem:
        group = bisect_right(self._starts, row) - 1
        return self._group(group)[row - self._starts[group]]

    def __iter__(self) -> Iterator[Problem]:
        return (
            _checked(row, path=self._path, number=number, columns=self._columns)
            for number, row in read_rows(self._path)
        )

    def _read_group(self, group: int) -> list[Problem]:
        rows = self._file.read_row_group(group).to_pylist()
        first = self._starts[group]
        return [_checked(r, path=self._path, number=first + i, columns=self._columns) for i, r in enumerate(rows)]


def _own_problems(
    function: str, arguments: tuple[str, ...], columns: ColumnsConfig | None, setting: str
) -> Iterator[Problem]:
    """Raises DataError with the number of a row that is no problem, and for whatever the function raises."""
    make: Callable[..., Iterable[Any]] = load(function, setting)
    path = Path(function.partition(":")[0].rpartition(".")[2])
    number = 0
    try:
        for number, row in enumerate(make(*arguments)):
            if isinstance(row, Problem):
                yield row
            elif isinstance(row, Mapping):
                yield to_problem(row, path=path, number=number, columns=columns)
            else:
                raise DataError(f"row {number} is no mapping and no Problem but {type(row).__name__}")
    except DataError as exc:
        raise DataError(f"{setting} = {function}: {exc}") from exc
    except Exception as exc:  # the boundary to a user's function
        raise DataError(f"{setting} = {function}: row {number}: {type(exc).__name__}: {exc}") from exc


def _checked(row: Row | str, *, path: Path, number: int, columns: ColumnsConfig | None) -> Problem:
    if isinstance(row, str):
        raise DataError(
            f"{place(path, number)}: {row}; `tools/prepare_data.py` leaves broken rows out and reports them"
        )
    return to_problem(row, path=path, number=number, columns=columns)


def _digest(problems: Iterable[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.problem}\x00{problem.answer}\x01".encode())
    return digest.hexdigest()[:16]
