"""The policy's tokenizer, reduced to what the system does with it: encode plain text once, decode ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torl_mega.errors import DataError

PROBE_TEXT = "Let x = 12.5;\n\n```python\nprint(x ** 2,\t'π ≈ 3.14159')\n```\n```output\n156.25\n```\nSo \\boxed{156.25}. 中文 🙂"


class Tokenizer:
    """Encodes without adding or recognising special tokens, so text from outside cannot forge one."""

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer  # heavy; only processes that tokenise pay for it

        if not Path(path).is_dir():
            raise DataError(f"model.path = {str(path)!r} is not a folder; give one with config.json and a tokenizer")
        try:
            self._hf = AutoTokenizer.from_pretrained(str(path))
        except Exception as exc:  # the boundary to transformers: its errors have no common base
            raise DataError(f"{path}: no tokenizer could be read from it: {' '.join(str(exc).split())[:300]}") from exc
        eos = self._hf.eos_token_id
        if eos is None:
            raise DataError(f"{path}: the tokenizer has no EOS token; set `eos_token` in tokenizer_config.json")
        self.eos_id: int = int(eos)
        self.vocab_size: int = len(self._hf)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text; text that looks like a special token is encoded as text."""
        return tuple(self._hf.encode(text, add_special_tokens=False, split_special_tokens=True))

    def check_plain(self, text: str, setting: str) -> None:
        """Raises DataError when `text` holds what looks like a special token, which `encode` would make ordinary text of."""
        special = {str(token) for token in self._hf.added_tokens_decoder.values() if token.special}
        found = next((token for token in sorted(special, key=len, reverse=True) if token and token in text), None)
        if found is not None:
            raise DataError(
                f"{setting} holds {found!r}, a special token of the tokenizer, but is encoded as plain text, so that the model "
                f"would read its letters; leave it out, and take a base model or a template without it"
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of any ids, special tokens included, with no character added or taken away."""
        return self._hf.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def check_lossless(self) -> None:
        """Raises DataError when the probe text does not come back as it went in (a wrong tokenizer class does that)."""
        back = self.decode(self.encode(PROBE_TEXT))
        if back != PROBE_TEXT:
            at = next((i for i, (a, b) in enumerate(zip(back, PROBE_TEXT, strict=False)) if a != b), len(back))
            raise DataError(
                f"the tokenizer is not lossless: at character {at} {PROBE_TEXT[at : at + 12]!r} came back as "
                f"{back[at : at + 12]!r}; the tokenizer files and model_type in config.json do not belong together"
            )
