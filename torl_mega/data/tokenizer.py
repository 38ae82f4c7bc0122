"""The policy's tokenizer, reduced to what the system does with it: encode plain text once, decode ids."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        files = sorted({name for name in self._hf.vocab_files_names.values() if name})
        there = any((Path(path) / name).exists() for name in (*files, "tokenizer.model", "tekken.json"))
        if files and not there:  # transformers makes an empty one then
            raise DataError(
                f"{path} holds no tokenizer (none of {', '.join(files)}); copy the base model's files into it"
            )
        eos = self._hf.eos_token_id
        if eos is None:
            raise DataError(f"{path}: the tokenizer has no EOS token; set `eos_token` in tokenizer_config.json")
        self.path = Path(path)
        self.eos_id: int = int(eos)
        self.eos_ids = frozenset({self.eos_id, *_generation_eos(self.path)})
        """What ends an answer on the servers too, which read generation_config.json."""
        self.vocab_size: int = len(self._hf)
        self.added: dict[str, int] = {str(t): n for n, t in self._hf.added_tokens_decoder.items()}
        """Tokens beside the trained vocabulary, special or not, which `encode_with_special` sees in any text."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text; text that looks like a special token is encoded as text."""
        return tuple(self._hf.encode(text, add_special_tokens=False, split_special_tokens=True))

    def encode_with_special(self, text: str) -> tuple[int, ...]:
        """Token ids of text in which special tokens are meant; only for text that nobody outside wrote."""
        return tuple(self._hf.encode(text, add_special_tokens=False, split_special_tokens=False))

    def chat_template(self, *, for_tools: bool) -> str:
        """The template, of several the one for tools or the default. Raises DataError for a tokenizer without one."""
        template = self._hf.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use" if for_tools and "tool_use" in template else "default")
        if not isinstance(template, str):
            raise DataError(
                f"{self.path}: data.template = chat, but its tokenizer has no chat template (chat_template.jinja, or chat_template "
                f"in tokenizer_config.json); take an instruct model, or a text with {{problem}}"
            )
        return template

    @property
    def chat_keywords(self) -> frozenset[str]:
        """What `apply_chat_template` takes for itself and does not hand to a template."""
        return frozenset(inspect.signature(self._hf.apply_chat_template).parameters)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        *,
        generate: bool,
        arguments: Mapping[str, Any],
    ) -> str:
        """The text of a conversation; with `generate` up to where the assistant begins. Raises DataError for one that the
        template refuses."""
        try:
            return self._hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.chat_template(for_tools=bool(tools)),
                tokenize=False,
                add_generation_prompt=generate,
                **arguments,
            )
        except DataError:
            raise
        except Exception as exc:  # the boundary to the template's author
            last = f"message {len(messages)} ({messages[-1]['role']})"
            raise DataError(
                f"the chat template of {self.path} refuses {last}: {' '.join(str(exc).split())[:200]}"
            ) from exc

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


def _generation_eos(path: Path) -> list[int]:
    try:
        found = json.loads((path / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [int(n) for n in (found if isinstance(found, list) else [found] if found is not None else [])]
