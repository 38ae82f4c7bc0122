"""Problems become prompts: open a data set, template and encode each problem once, hand them out epoch by epoch.

    data.train ─► open_problems ─► PromptSource.next(n) ─► Prompt, Prompt, …
                  (checked row by row)   (order from seed and epoch; the cursor is two numbers)

Contract: the same data, seed and cursor give the same prompts on every machine. An epoch hands out each kept row
exactly once; the next epoch follows in the same call where one runs out. Files are read lazily, a group of rows at a
time, so a file may be larger than memory; what is kept for each row is its number.

Limits: a parquet file is shuffled fast only when its row groups are small (`tools/prepare_data.py` writes 1,024 rows a
group); in one with huge row groups every group that is touched is decoded whole. No torch here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torl_mega.config import DataConfig
from torl_mega.data import arithmetic
from torl_mega.data.readers import Row, parse_line, place, read_rows, to_problem
from torl_mega.errors import DataError
from torl_mega.types import Problem, Prompt

TORL_PAPER = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
    "User: Please integrate natural language reasoning with programs to solve the problem above, "
    "and put your final answer within \\boxed{}.\n"
    "{problem}\n"
    "Assistant:"
)
TEMPLATES = {"torl": TORL_PAPER + "\n", "torl_paper": TORL_PAPER}

log = logging.getLogger(__name__)

Encode = Callable[[str], Sequence[int]]

KNOWN_ROWS = {"torl_train": 28_740}  # arXiv 2503.23383 §2.1
_CACHED_GROUPS = 8


def render_template(template: str, problem: Problem) -> str:
    """The text the policy sees. `template` is `torl`, `torl_paper` or a text in which every `{problem}` is replaced.

    Only `{problem}` means anything: other braces, as in `\\boxed{}`, stay as they are. Raises DataError without it.
    """
    text = TEMPLATES.get(template, template)
    if "{problem}" not in text:
        raise DataError(
            f"data.template = {template!r} has no {{problem}} in it; use {', '.join(TEMPLATES)} or a text with {{problem}}"
        )
    return text.replace("{problem}", problem.problem)


def encode_prompts(
    problems: Iterable[Problem], *, template: str, encode: Encode, max_prompt_tokens: int, overlong: str = "error"
) -> list[Prompt]:
    """Prompts for `problems`, in order. A prompt above `max_prompt_tokens` raises DataError (`error`) or is left out (`drop`)."""
    prompts = []
    for problem in problems:
        prompt = _encode(problem, template=template, encode=encode)
        if len(prompt.token_ids) <= max_prompt_tokens:
            prompts.append(prompt)
        elif overlong == "error":
            raise _too_long(prompt, max_prompt_tokens)
    return prompts


def load_problems(spec: str, *, max_problems: int | None = None) -> list[Problem]:
    """The first `max_problems` of `spec` (all when None) in memory, for evaluation.

    Raises DataError for a missing, unknown, empty or broken file, and for `arithmetic:SEED` without `max_problems`,
    because that one never ends.
    """
    seed = _arithmetic_seed(spec)
    if seed is not None:
        if max_problems is None:
            raise DataError(f"{spec} never ends; say how many with eval.max_problems")
        return list(itertools.islice(arithmetic.problems(seed), max_problems))
    path = Path(spec)
    rows = itertools.islice(read_rows(path), max_problems)
    problems = [_checked(row, path=path, number=number) for number, row in rows]
    if not problems:
        raise DataError(f"{path}: no problems in it")
    return problems


class PromptSource:
    """Hands out training prompts. Overlong ones are found (and named or counted) before the first step, not during it.

    `encode` turns text into token ids; `seed` decides the order of every epoch.
    """

    def __init__(self, config: DataConfig, encode: Encode, *, seed: int) -> None:
        self._config = config
        self._encode = encode
        self._waiting: list[Problem] = []  # handed out and put back
        self._retired: set[str] = set()  # ids of problems that are not handed out again
        arithmetic_seed = _arithmetic_seed(config.train)
        if arithmetic_seed is None:
            self._cursor: _EpochCursor | _StreamCursor = self._open_file(seed)
        else:
            self.num_dropped, self.num_problems = 0, None
            self._cursor = _StreamCursor(lambda: arithmetic.problems(arithmetic_seed), name=config.train)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts: those that were put back, then the cursor's."""
        prompts: list[Prompt] = []
        while len(prompts) < n:
            problem = self._waiting.pop(0) if self._waiting else self._advance()
            prompt = _encode(problem, template=self._config.template, encode=self._encode)
            if len(prompt.token_ids) <= self._config.max_prompt_tokens:
                prompts.append(prompt)
            elif self._config.overlong_prompts == "error":
                raise _too_long(prompt, self._config.max_prompt_tokens)
        return prompts

    def _advance(self) -> Problem:
        """The cursor's next problem that is not retired; when all are, they start over."""
        for _ in range(self.num_problems or 0):
            problem = self._cursor.advance()
            if problem.problem_id not in self._retired:
                return problem
        if self.num_problems:
            log.warning("every problem of %s is retired (data.retire_above); all of them come back", self._config.train)
            self._retired.clear()
        return self._cursor.advance()

    def retire(self, problem_ids: Sequence[str]) -> None:
        """These are mastered and not handed out again. Generated problems do not come back anyway."""
        if self.num_problems is not None:
            self._retired.update(problem_ids)

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """These were not used after all; they come first in the next `next`."""
        self._waiting = [prompt.problem for prompt in prompts] + self._waiting

    def state(self) -> dict[str, Any]:
        """The cursor as JSON: what `restore` needs to go on with the very next prompt."""
        waiting = [dataclasses.asdict(problem) for problem in self._waiting]
        return {**self._cursor.state(), "waiting": waiting, "retired": sorted(self._retired)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state()` was taken. Raises DataError when the data, its order or the seed are no longer the same."""
        self._cursor.restore(state)
        self._waiting = [Problem(**fields) for fields in state["waiting"]]
        self._retired = set(state.get("retired", ()))

    def _open_file(self, seed: int) -> _EpochCursor:
        problems = open_problems(self._config.train)
        kept = np.fromiter(self._kept_rows(problems), dtype=np.int64)
        if not len(kept):
            raise DataError(
                f"{self._config.train}: none of its {len(problems)} prompts fits data.max_prompt_tokens = "
                f"{self._config.max_prompt_tokens}"
            )
        wanted = KNOWN_ROWS.get(Path(self._config.train).stem, len(problems))
        if len(problems) != wanted:
            log.warning("%s has %d problems; the paper trains on %d", self._config.train, len(problems), wanted)
        self.num_dropped, self.num_problems = len(problems) - len(kept), len(kept)
        return _EpochCursor(problems, kept, seed=seed, shuffle=self._config.shuffle)

    def _kept_rows(self, problems: ProblemFile) -> Iterator[int]:
        config = self._config
        for row, problem in enumerate(problems):
            prompt = _encode(problem, template=config.template, encode=self._encode)
            if len(prompt.token_ids) <= config.max_prompt_tokens:
                yield row
            elif config.overlong_prompts == "error":
                raise _too_long(prompt, config.max_prompt_tokens)


class _EpochCursor:
    """Walks a file in an order that `seed` and the number of the epoch decide; its state is (epoch, position)."""

    def __init__(self, problems: ProblemFile, kept: np.ndarray, *, seed: int, shuffle: bool) -> None:
        self._problems, self._kept = problems, kept  # kept: [N] row numbers
        self._seed, self._shuffle = seed, shuffle
        self._epoch, self._position = 0, 0
        self._order = self._order_of(0)
        self._identity = f"{problems.digest}:{len(kept)}:{seed if shuffle else 'file order'}"

    def advance(self) -> Problem:
        if self._position == len(self._kept):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        row = int(self._kept[self._order[self._position]])
        self._position += 1
        return self._problems[row]

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, "data": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self._identity:
            raise DataError(
                f"the checkpoint's cursor belongs to other training data or another seed ({state['data']}) than the "
                f"config now names ({self._identity}); restore data.train, data.shuffle and seed, or start a new run name"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._kept))
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._kept))


class _StreamCursor:
    """Walks an endless generator; its state is how many problems were drawn."""

    def __init__(self, make: Callable[[], Iterator[Problem]], *, name: str) -> None:
        self._make, self._name = make, name
        self._stream, self._position = make(), 0

    def advance(self) -> Problem:
        self._position += 1
        return next(self._stream)

    def state(self) -> dict[str, Any]:
        return {"position": self._position, "data": self._name}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self._name:
            raise DataError(
                f"the checkpoint's cursor belongs to {state['data']}, the config says data.train = {self._name}"
            )
        self._position = int(state["position"])
        self._stream = itertools.islice(self._make(), self._position, None)


# ------------------------------------------------------------------------------------------------ files


class ProblemFile(Protocol):
    """A data file as a sequence of problems, every row checked when it was opened."""

    digest: str  # of every problem and answer, in order

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Problem: ...

    def __iter__(self) -> Iterator[Problem]: ...


def open_problems(spec: str) -> ProblemFile:
    """The file `spec` for random access. Reads it once, row by row; raises DataError at the first broken row."""
    path = Path(spec)
    if path.suffix == ".parquet":
        return _ParquetFile(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _LinesFile(path)
    return _MemoryFile(path)


class _MemoryFile:
    """The formats that cannot be read in pieces (.json, .arrow of a saved data set)."""

    def __init__(self, path: Path) -> None:
        self._problems = load_problems(str(path))
        self.digest = _digest(self._problems)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, row: int) -> Problem:
        return self._problems[row]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems)


class _LinesFile:
    """A .jsonl file: the offset of each line is kept, the lines are read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.digest = _digest(_checked(row, path=path, number=number) for number, row in read_rows(path))
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
            return _checked(parse_line(file.readline()), path=self._path, number=int(self._lines[row]))

    def __iter__(self) -> Iterator[Problem]:
        return (_checked(row, path=self._path, number=number) for number, row in read_rows(self._path))


class _ParquetFile:
    """A .parquet file: row groups are decoded when asked for, the last few are kept."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
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
        return (_checked(row, path=self._path, number=number) for number, row in read_rows(self._path))

    def _read_group(self, group: int) -> list[Problem]:
        rows = self._file.read_row_group(group).to_pylist()
        return [_checked(row, path=self._path, number=self._starts[group] + i) for i, row in enumerate(rows)]


def _checked(row: Row | str, *, path: Path, number: int) -> Problem:
    if isinstance(row, str):
        raise DataError(
            f"{place(path, number)}: {row}; `tools/prepare_data.py` leaves broken rows out and reports them"
        )
    return to_problem(row, path=path, number=number)


def _digest(problems: Iterable[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.problem}\x00{problem.answer}\x01".encode())
    return digest.hexdigest()[:16]


def _encode(problem: Problem, *, template: str, encode: Encode) -> Prompt:
    return Prompt(problem=problem, token_ids=tuple(encode(render_template(template, problem))))


def _too_long(prompt: Prompt, limit: int) -> DataError:
    return DataError(
        f"{prompt.problem.problem_id}: its prompt has {len(prompt.token_ids)} tokens, data.max_prompt_tokens is {limit}; "
        f"raise the limit or set data.overlong_prompts=drop"
    )


def _arithmetic_seed(spec: str) -> int | None:
    kind, colon, seed = spec.partition(":")
    if kind != "arithmetic" or not colon:
        return None
    if not seed.isdigit():
        raise DataError(f"{spec}: expected arithmetic:SEED with a whole number, as in arithmetic:1")
    return int(seed)
