"""The tool `search`: BM25 over the texts of a local folder, by the library bm25s. No network, nothing but the folder is read.

Every `.txt` and `.md` file is cut at blank lines into passages of at most PASSAGE_WORDS words; a `.jsonl` file gives a passage per
row, its `text` (or `contents`), with its `title`. The index is made once for all trajectories, when the run starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from torl_mega.errors import DataError
from torl_mega.rollout.own_tool import OwnTool, tool_of_class

PASSAGE_WORDS = 120
ENDINGS = (".txt", ".md", ".jsonl")


class Index:
    """Raises DataError for a folder that is not there, or holds no text."""

    def __init__(self, folder: Path) -> None:
        import bm25s  # numpy and scipy: only runs that search pay for it

        if not folder.is_dir():
            raise DataError(
                f"rollout.search_folder = {str(folder)!r} is not a folder; it holds {', '.join(ENDINGS)} files"
            )
        self.passages = list(_passages(folder))
        if not self.passages:
            raise DataError(f"rollout.search_folder = {str(folder)!r} holds no text in {', '.join(ENDINGS)} files")
        self._bm25s = bm25s
        self._index = bm25s.BM25()
        tokens = self._tokens([f"{title} {text}" for title, text in self.passages])
        if not tokens.vocab:  # pyright: ignore[reportAttributeAccessIssue]
            raise DataError(f"rollout.search_folder = {str(folder)!r} holds no words to search by")
        self._index.index(tokens, show_progress=False)

    def find(self, query: str, num: int) -> list[tuple[str, str]]:
        """(title, text) of at most `num` passages that share a word with `query`, the best first."""
        num = min(num, len(self.passages))
        found, scores = self._index.retrieve(self._tokens([query]), k=num, show_progress=False)
        return [self.passages[int(n)] for n, score in zip(found[0], scores[0], strict=True) if score > 0]

    def _tokens(self, texts: list[str]):
        return self._bm25s.tokenize(texts, stopwords="en", show_progress=False)


def make_search(folder: Path, *, max_chars: int) -> OwnTool:
    """The tool over `folder`."""
    index, shown = Index(folder), max_chars

    class Search:
        """Finds passages in a collection of texts by their words."""

        max_chars = shown

        async def __call__(self, query: str, num: Annotated[int, Field(ge=1, le=10)] = 3) -> str:
            found = index.find(query, num)
            return "\n".join(f"[{title}] {text}" for title, text in found) or "(nothing found)"

    return tool_of_class(Search, "search")


def _passages(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix in ENDINGS and p.is_file()):
        name = str(path.relative_to(folder).with_suffix(""))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"rollout.search_folder: {path}: {exc}") from exc
        if path.suffix == ".jsonl":
            yield from _rows(path, name, text)
            continue
        for part in text.split("\n\n"):
            words = part.split()
            for at in range(0, len(words), PASSAGE_WORDS):
                yield name, " ".join(words[at : at + PASSAGE_WORDS])


def _rows(path: Path, name: str, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            said = row["text"] if "text" in row else row["contents"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise DataError(
                f"rollout.search_folder: {path}:{number}: no JSON object with `text` or `contents`"
            ) from exc
        if isinstance(said, str) and said.strip():
            yield str(row.get("title") or name), " ".join(said.split())
