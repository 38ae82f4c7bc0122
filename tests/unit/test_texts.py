"""Rows of `torl pretrain`: masks, order, resume, and what is said of a broken row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_tiny_model

from torl_mega.data.texts import batches, encode
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tiny_model(tmp_path_factory.mktemp("model")))


def written(tokenizer: Tokenizer, row: dict, loss_on: Any = "completion") -> str:
    sample = encode(row, tokenizer, loss_on=loss_on, where="here")
    return tokenizer.decode(sample.token_ids[sample.loss_mask].tolist())


def test_what_is_trained(tokenizer: Tokenizer) -> None:
    end = tokenizer.decode([tokenizer.eos_id])
    pieces = {"prompt": "Q", "pieces": [["abc", True], ["def", False], ["ghi", True]]}
    assert written(tokenizer, pieces) == "abcghi" + end
    assert written(tokenizer, pieces, "all") == "abcdefghi" + end
    assert written(tokenizer, {"prompt": "Q", "completion": "abc"}) == "abc" + end
    assert written(tokenizer, {"text": "abc"}) == "bc" + end
    assert written(tokenizer, {"prompt": "<|endoftext|>", "completion": "x"}, "all").startswith("|endoftext|>x")


def numbered() -> Iterator[dict[str, str]]:
    """Seven rows, the third far longer than the others."""
    return ({"text": f"row {n} " + "long " * (50 if n == 2 else 0)} for n in range(7))


def texts(tokenizer: Tokenizer, spec: str, *, skip: int, count: int, overlong: str = "error", most: int = 999) -> list:
    found = batches(
        spec, tokenizer, loss_on="all", max_tokens=most, overlong=overlong, size=2, seed=5, skip=skip
    )  # fmt: skip
    return [[tokenizer.decode(s.token_ids[:5].tolist()) for s in batch] for batch in islice(found, count)]


@pytest.mark.parametrize("overlong", ["error", "drop"])
@pytest.mark.parametrize("kind", ["file", "function"])
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path, tokenizer: Tokenizer, kind: str, overlong: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in numbered()) + "\n\n")
    spec = str(file) if kind == "file" else f"{__name__}:numbered"
    most = 60 if overlong == "drop" else 999
    whole = texts(tokenizer, spec, skip=0, count=12, overlong=overlong, most=most)
    assert texts(tokenizer, spec, skip=5, count=7, overlong=overlong, most=most) == whole[5:]
    flat = [text for batch in whole for text in batch]
    size = 6 if overlong == "drop" else 7
    first, second = flat[:size], flat[size : 2 * size]
    assert sorted(first) == sorted(second)
    assert len(set(first)) == size
    assert (first == second) == (kind == "function")
    assert (first == sorted(first)) == (kind == "function")


def nothing() -> Iterator[dict[str, str]]:
    return iter(())


def raises() -> Iterator[dict[str, str]]:
    yield {"text": "one"}
    raise ValueError("no more")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": 3}', "rows.jsonl:1: a row with text; expected `text`"),
        ('{"prompt": "a", "pieces": [["b", 1]]}', "a row with prompt, pieces; expected"),
        ("[1]", "rows.jsonl:1: list; expected"),
        ("{", "rows.jsonl:1: no JSON"),
        ("", "no rows in it"),
        (json.dumps({"text": "x" * 100}), "101 tokens, more than data.max_prompt_tokens"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, tokenizer: Tokenizer, line: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"^[^\n]*$") as caught:
        texts(tokenizer, str(tmp_path / "rows.jsonl"), skip=0, count=1, most=50)
    assert said in str(caught.value)


def test_a_function_that_is_none_or_fails_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="it yields no rows"):
        texts(tokenizer, f"{__name__}:nothing", skip=0, count=1)
    with pytest.raises(DataError, match="ValueError: no more"):
        texts(tokenizer, f"{__name__}:raises", skip=0, count=1)
    with pytest.raises(ConfigError, match=r"pretrain\.data = test_texts:absent"):
        texts(tokenizer, f"{__name__}:absent", skip=0, count=1)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.raises(DataError, match=r"holds no tokenizer \(none of merges.txt, tokenizer.json, vocab.json\); copy"):
        Tokenizer(model)
