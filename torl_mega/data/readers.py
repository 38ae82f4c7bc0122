"""Reads problems out of files: one function per format, streaming; every error names the file and the row.

Formats, recognised by the file's ending and by the columns of its rows:

    ToRL / verl     data_source, prompt: [{role, content}] or text, reward_model: {ground_truth}, extra_info: {id | index}
    slime           prompt: [{role, content}] or text, label
    plain           problem | question | prompt, gt_answer | answer | final_answer | ground_truth; optional id, source
    MATH            problem, solution (the answer is the last \\boxed{} of the solution)
    NuminaMath      problem, solution, answer, problem_type, question_type, source
    DeepScaleR      problem, answer, solution

`read_rows` yields raw rows, `to_problem` makes one `Problem` of a row. Neither holds more than one batch of a file in
memory. A gold answer is taken out of its dress: a `\\boxed{}` (in a solution the last one), GSM8K's `#### 72`, a JSON list of
one string. Nothing else here drops or mends a row: `tools/prepare_data.py` does that and reports it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from torl_mega.config import ColumnsConfig
from torl_mega.errors import DataError
from torl_mega.reward.extract import last_boxed
from torl_mega.types import Problem

Row = Mapping[str, Any]

SYSTEM = "system"
"""Where `Problem.extra` keeps a system message that a row brings: a chat template puts it in the place of data.system."""

_LINE_ENDINGS = (".jsonl", ".ndjson")
_PROBLEM_KEYS = ("problem", "question", "prompt")
_ANSWER_KEYS = ("gt_answer", "answer", "final_answer", "ground_truth", "expected_answer", "label")
_ID_KEYS = ("id", "unique_id", "uuid", "problem_id", "index")
_LISTED = re.compile(r'\[\s*"((?:[^"\\]|\\.)*)"\s*\]')
_TEMPLATE_HEAD = "A conversation between User and Assistant."
_DAPO_HEAD = (  # DAPO-Math-17k's own instruction, which asks for another form of answer than a box
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem."
)
_DAPO_ASK = 'Remember to put your answer on its own line after "Answer:".'
_TEMPLATE_ASK = "put your final answer within \\boxed{}.\n"


def read_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """(row number from 0, row) of a .parquet, .jsonl, .json or .arrow file; what is not an object comes as text saying why.

    Row numbers of a .jsonl are line numbers from 0. Raises DataError for a missing or unreadable file or an unknown ending.
    """
    if not path.exists():
        raise DataError(f"{path}: no such data file; data.train and eval.data take .parquet, .jsonl or arithmetic:SEED")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in _LINE_ENDINGS:
        yield from _jsonl_rows(path)
    elif path.suffix == ".json":
        yield from _json_rows(path)
    elif path.suffix == ".arrow":
        yield from _arrow_rows(path)
    else:
        raise DataError(
            f"{path}: ending {path.suffix!r} is not a known data format; expected .parquet, .jsonl, .json or .arrow"
        )


def place(path: Path, number: int) -> str:
    """Where row `number` (from 0) stands, for messages: `file:line` as editors count it, else `file: row N` from 0."""
    return f"{path}:{number + 1}" if path.suffix in _LINE_ENDINGS else f"{path}: row {number}"


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: not readable as parquet: {' '.join(str(exc).split())}") from None


def _arrow_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """A file that `datasets.save_to_disk` wrote."""
    import pyarrow as pa

    try:
        number = 0
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: not readable as an arrow stream: {' '.join(str(exc).split())}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                yield number, parse_line(line)


def parse_line(line: bytes) -> Row | str:
    """One line of a .jsonl file; text saying what is wrong with it when it is not a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as exc:
        return f"not JSON ({exc})"
    return row if isinstance(row, dict) else f"expected a JSON object, found {type(row).__name__}"


def _json_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not readable as JSON: {exc}") from None
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows):
        yield number, row if isinstance(row, dict) else f"expected a JSON object, found {type(row).__name__}"


def to_problem(row: Row, *, path: Path, number: int, columns: ColumnsConfig | None = None) -> Problem:
    """The problem in one row of any known format, or in the columns that `columns` names, with what it keeps in `extra`.

    Raises DataError with file and row when a part is missing or of a wrong type.
    """
    if columns is None:
        return _known_layout(row, path=path, number=number)
    where, renamed = place(path, number), dict(row)
    for part, key in (("problem", columns.problem), ("answer", columns.answer)):
        if key is not None:
            renamed[part] = _column(row, key, where)
    # the layout is the user's: a verl row's own parts step back
    if columns.problem is not None or columns.answer is not None:
        if isinstance(renamed.get("problem"), list):
            renamed["problem"] = bare_problem(_last_user_text(renamed["problem"], where))
        renamed = {key: value for key, value in renamed.items() if key not in ("prompt", "reward_model")}
    problem = _known_layout(renamed, path=path, number=number)
    kept = {key: _column(row, key, where) for key in columns.extra}
    return dataclasses.replace(problem, extra=json.loads(json.dumps(kept, default=str)))  # it is logged and travels


def has_columns(row: Row, columns: ColumnsConfig) -> bool:
    """Whether a row has all that `columns` names."""
    try:
        for key in (columns.problem, columns.answer, *columns.extra):
            _column(row, key, "") if key is not None else None
    except DataError:
        return False
    return True


def _column(row: Row, key: str, where: str) -> Any:
    """The value in column `key`; `a.b` is field b of a nested column a, unless there is a column of that whole name."""
    value: Any = row
    for name in (key,) if key in row else key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise DataError(f"{where}: no column {key!r} (data.columns); found {', '.join(map(str, row)) or 'none'}")
        value = value[name]
    return value


def _known_layout(row: Row, *, path: Path, number: int) -> Problem:
    where = place(path, number)
    row = {str(key).lower(): value for key, value in row.items()}  # AIME's public files write Problem and Answer
    if "reward_model" in row or isinstance(row.get("prompt"), list):
        return _verl_problem(row, where=where, default_source=_default_source(path), number=number)
    problem = _first_text(row, _PROBLEM_KEYS)
    if problem is None:
        raise DataError(
            f"{where}: no problem text; expected a column {' or '.join(_PROBLEM_KEYS)}, found {', '.join(map(str, row)) or 'none'}"
        )
    answer = _gold(_first_text(row, _ANSWER_KEYS))
    if answer is None and isinstance(row.get("solution"), str):
        answer = last_boxed(row["solution"])
    if answer is None:
        raise DataError(
            f"{where}: no answer; expected a column {' or '.join(_ANSWER_KEYS)}, or a solution with a \\boxed{{}} in it"
        )
    source = str(row.get("source") or row.get("data_source") or _default_source(path))
    return Problem(problem_id=f"{source}/{_row_id(row, number)}", problem=problem, answer=answer, source=source)


def _default_source(path: Path) -> str:
    """`aime24/test.jsonl`, `aime24/data/train-00000-of-00001.parquet` and `aime24.jsonl` are all aime24."""
    if not re.fullmatch(r"(test|train|validation|data)(-\d+-of-\d+)?", path.stem):
        return path.stem
    folders = path.resolve().parents
    return folders[1].name if folders[0].name == "data" and folders[1].name else folders[0].name


def _verl_problem(row: Row, *, where: str, default_source: str, number: int) -> Problem:
    messages, reward_model = row.get("prompt"), row.get("reward_model")
    if isinstance(messages, str):  # the processed DAPO set
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: prompt = {messages!r} is not a list of chat messages, as in the verl format")
    text = _last_user_text(messages, where)
    if isinstance(reward_model, Mapping):
        answer = _gold(_as_text(reward_model.get("ground_truth")))
    else:  # slime's prompt and label
        answer = None if "reward_model" in row else _gold(_first_text(row, _ANSWER_KEYS))
    if answer is None:
        raise DataError(f"{where}: reward_model.ground_truth is missing or empty; expected the gold answer as text")
    source = str(row.get("data_source") or default_source)
    extra = row.get("extra_info")
    identity = _row_id(extra if isinstance(extra, Mapping) else {}, number)
    told = _system_text(messages)
    return Problem(
        problem_id=f"{source}/{identity}",
        problem=bare_problem(text),
        answer=answer,
        source=source,
        extra={} if told is None else {SYSTEM: told},
    )


def system_of(problem: Problem) -> str | None:
    """The system message that the problem's row brought."""
    told = problem.extra.get(SYSTEM)
    return told if isinstance(told, str) and told.strip() else None


def _system_text(messages: list[Any]) -> str | None:
    """The row's own system message."""
    said = [m.get("content") for m in messages if isinstance(m, Mapping) and m.get("role") == "system"]
    return next((text for text in said if isinstance(text, str) and text.strip()), None)


def _last_user_text(messages: list[Any], where: str) -> str:
    user = [
        m for m in messages if isinstance(m, Mapping) and m.get("role") == "user" and isinstance(m.get("content"), str)
    ]
    if not user or not user[-1]["content"].strip():
        raise DataError(f"{where}: prompt holds no message of role user with text")
    return user[-1]["content"]


def bare_problem(content: str) -> str:
    """The problem without the prompt of ToRL or DAPO around it; text that carries neither comes back as it is."""
    if content.startswith(_DAPO_HEAD) and content.rstrip().endswith(_DAPO_ASK):
        return content.rstrip().removesuffix(_DAPO_ASK).removeprefix(_DAPO_HEAD).strip()
    if not content.startswith(_TEMPLATE_HEAD) or _TEMPLATE_ASK not in content:
        return content
    inner = content.split(_TEMPLATE_ASK, 1)[1].rstrip("\n")
    return inner.removesuffix("Assistant:").rstrip("\n")


def _row_id(row: Row, number: int) -> str:
    """The row's own id made unique by its number: released files repeat ids where they repeat rows."""
    own = next((str(row[key]) for key in _ID_KEYS if row.get(key) not in (None, "")), None)
    return str(number) if own is None else f"{number}-{own}"


def _first_text(row: Row, keys: tuple[str, ...]) -> str | None:
    return next((text for key in keys if (text := _as_text(row.get(key))) is not None), None)


def _gold(text: str | None) -> str | None:
    """A gold answer out of its dress: the last box of a solution, what stands behind GSM8K's `####`, `["35"]` of Skywork-OR1."""
    if text is None:
        return None
    if listed := _LISTED.fullmatch(text):
        try:
            inside = str(json.loads(text)[0])
        except ValueError:  # `\s` of a command that was not escaped is no JSON
            inside = "\f"
        # where JSON reads a control character, `\f` of `\frac`, the list was written without escaping
        text = str(listed[1]) if re.search(r"[\x00-\x1f]", inside) else inside
    if "\\boxed" in text:
        text = last_boxed(text) or ""
    elif marked := re.search(r"####\s*([^\n#]+)\s*$", text):
        text = str(marked[1])
    return text.strip() or None


def _as_text(value: Any) -> str | None:
    """Text of an answer column: strings and numbers, and lists that hold exactly one of them (OlympiadBench). NaN is none."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or value is None or value != value:
        return None
    if isinstance(value, (float, Decimal)) and value % 1 == 0:
        value = int(value)
    text = str(value).strip() if isinstance(value, (str, int, float, Decimal)) else ""
    return text or None
