"""Texts for `torl pretrain`: rows in, token sequences out, in an order that a resumed run finds again.

    row ─► {"text": "…"}                                       trained as a whole
           {"prompt": "…", "completion": "…"}
           {"prompt": "…", "pieces": [["…", true], …]}          each piece encoded on its own, as a rollout encodes turns and
                                                                observations; true where the model writes

Contract: a file's rows come in an order of their own each epoch (from `seed`); a function's in its own order, called anew when it
ends. An EOS token closes every row and is trained. The rows that a run has used are skipped, not trained again, on resume.
Limits: a file's rows are held in memory; skipping n rows of a function makes n rows.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import DataError
from torl_mega.import_path import is_import_path, load
from torl_mega.types import Sample

LossOn = Literal["completion", "all"]
EXPECTED = "expected `text`, or `prompt` with `completion` or with `pieces` of [text, true or false]"


def batches(
    spec: str, tokenizer: Tokenizer, *, loss_on: LossOn, max_tokens: int, overlong: str, size: int, seed: int, skip: int
) -> Iterator[list[Sample]]:
    """Endless batches of `size` rows, beginning after `skip` batches. `overlong`: whether a row of more than `max_tokens` is left
    out (`drop`) or an error. Raises DataError for a row that is none."""
    rows = itertools.islice(_rows(spec, seed), skip * size, None) if overlong != "drop" else _rows(spec, seed)
    encoded = (sample for row in rows for sample in _fitting(row, tokenizer, loss_on, max_tokens, overlong))
    if overlong == "drop":  # which rows are left out only their lengths say
        encoded = itertools.islice(encoded, skip * size, None)
    while True:
        yield list(itertools.islice(encoded, size))


def _rows(spec: str, seed: int) -> Iterator[tuple[str, Any]]:
    """Endless (where it stands, row)."""
    if is_import_path(spec):
        make = load(spec, "pretrain.data")
        for _ in itertools.count():
            row: Any = None
            for number, row in enumerate(_called(make, spec)):
                yield f"{spec}: row {number}", row
            if row is None:
                raise DataError(f"pretrain.data = {spec}: it yields no rows")
    path = Path(spec)
    lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: no rows in it")
    for epoch in itertools.count():
        order = list(range(len(lines)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for number, line in (lines[i] for i in order):
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as exc:
                raise DataError(f"{path}:{number}: no JSON ({exc}); {EXPECTED}") from exc


def _called(make: Any, spec: str) -> Iterator[Any]:
    try:
        rows: Iterable[Any] = make()
        yield from rows
    except Exception as exc:  # the boundary to a user's function
        raise DataError(f"pretrain.data = {spec}: {type(exc).__name__}: {exc}") from exc


def _fitting(
    placed: tuple[str, Any], tokenizer: Tokenizer, loss_on: LossOn, max_tokens: int, overlong: str
) -> list[Sample]:
    where, row = placed
    sample = encode(row, tokenizer, loss_on=loss_on, where=where)
    if len(sample.token_ids) <= max_tokens:
        return [sample]
    if overlong == "drop":
        return []
    raise DataError(
        f"{where}: {len(sample.token_ids)} tokens, more than data.max_prompt_tokens + rollout.max_response_tokens = {max_tokens}; "
        f"raise them, or say data.overlong_prompts=drop"
    )


def encode(row: Any, tokenizer: Tokenizer, *, loss_on: LossOn, where: str) -> Sample:
    """One row as a training sequence. Raises DataError."""
    ids: list[int] = []
    mask: list[bool] = []
    for text, written in (*_pieces(row, where), (None, True)):
        piece = (tokenizer.eos_id,) if text is None else tokenizer.encode(text)
        ids += piece
        mask += [written or loss_on == "all"] * len(piece)
    mask[0] = False  # nothing stands before it that could predict it
    return Sample(
        token_ids=np.array(ids, np.int64),
        loss_mask=np.array(mask, bool),
        rollout_logprobs=np.zeros(len(ids), np.float32),
        policy_versions=np.full(len(ids), -1, np.int32),
        advantage=0.0,
    )


def _pieces(row: Any, where: str) -> list[tuple[str, bool]]:
    match row:
        case {"prompt": str(prompt), "completion": str(completion)}:
            return [(prompt, False), (completion, True)]
        case {"prompt": str(prompt), "pieces": [*pieces]} if all(map(_is_piece, pieces)):
            return [(prompt, False), *((text, written) for text, written in pieces)]
        case {"text": str(text)}:
            return [(text, True)]
    said = f"a row with {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
    raise DataError(f"{where}: {said}; {EXPECTED}")


def _is_piece(piece: Any) -> bool:
    return (
        isinstance(piece, list | tuple) and len(piece) == 2 and isinstance(piece[0], str) and isinstance(piece[1], bool)
    )
