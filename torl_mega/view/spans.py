"""The text of tokens, fit to be shown: whole characters, and none that acts on its reader.

Contract: pure text, no HTML; `visible` makes every character that could act on a terminal or reorder a line (controls, ANSI
escapes, bidi marks, zero-width characters, lone surrogates) show as a printable stand-in.
Limits: tokens that share a character are one piece.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

MAX_TOKENS_PER_PIECE = 8  # a character has at most four bytes; more means bytes that never make one


def visible(text: str) -> str:
    """`text` with nothing in it that is invisible or acts, but line feeds and tabs."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(_shown(ch) for ch in text)


def _shown(ch: str) -> str:
    code = ord(ch)
    if ch in "\n\t" or (code >= 0x20 and ch.isprintable()):
        return ch
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(ch) in ("Zs", "Co"):
        return ch
    return f"⟨U+{code:04X}⟩"


class Pieces:
    """Texts of tokens under one tokenizer; each token that is whole characters is decoded once."""

    def __init__(self, decode: Decode) -> None:
        self.text = decode
        self._whole: dict[int, str | None] = {}  # None: not whole characters by itself

    def of(self, token_ids: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """The visible texts of the shortest runs of tokens that decode to whole characters, and [index, tokens] of every run
        that is not one token."""
        texts: list[str] = []
        counts: list[list[int]] = []
        first = 0
        for last in range(1, len(token_ids) + 1):
            text = self._single(token_ids[first]) if last - first == 1 else visible(self.text(token_ids[first:last]))
            if text is None or text.endswith("\ufffd"):
                if last - first < MAX_TOKENS_PER_PIECE and last < len(token_ids):
                    continue
                text = visible(self.text(token_ids[first:last]))
            if last - first != 1:
                counts.append([len(texts), last - first])
            texts.append(text)
            first = last
        return texts, counts

    def _single(self, token: int) -> str | None:
        if token not in self._whole:
            text = self.text((token,))
            self._whole[token] = None if text.endswith("\ufffd") else visible(text)
        return self._whole[token]
