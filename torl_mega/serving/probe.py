"""What a server thinks of a text, asked before step 0: its ids, its decoding, and the log-probs of a prompt.

A wrong tokenizer or a wrongly mapped weight never shows as an error later, only as a policy that does not learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import aiohttp
import numpy as np

from torl_mega.errors import ServerError

TIMEOUT_S = 120.0


class TextCodec(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


async def check_tokenizer(url: str, tokenizer: TextCodec, probe_text: str) -> None:
    """Raises ServerError saying which side differs unless server and `tokenizer` encode alike and both decode back to
    `probe_text`."""
    here = list(tokenizer.encode(probe_text))
    answer = await _post(url, "/tokenize", {"prompt": probe_text, "add_special_tokens": False})
    there = [int(token) for token in answer["tokens"]]
    if there != here:
        at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
        raise ServerError(
            f"{url} and the trainer encode the probe text differently from token {at} on: {there[at : at + 4]} there, "
            f"{here[at : at + 4]} here; both must read the tokenizer of the same folder"
        )
    answer = await _post(url, "/detokenize", {"tokens": here, "skip_special_tokens": False})
    for side, text in ((f"{url} decodes", answer["text"]), ("the trainer's tokenizer decodes", tokenizer.decode(here))):
        if text != probe_text:
            at = next((i for i, (a, b) in enumerate(zip(text, probe_text, strict=False)) if a != b), len(text))
            raise ServerError(
                f"{side} the probe text with a loss: {probe_text[at : at + 12]!r} came back as {text[at : at + 12]!r}; "
                f"the tokenizer files and model_type in config.json do not belong together"
            )


async def prompt_logprobs(url: str, token_ids: Sequence[int]) -> np.ndarray:
    """[T] float32 at temperature 1: position t is log p(token t | tokens < t); position 0 is 0. Raises ServerError."""
    body = {
        "input_ids": list(token_ids),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = await _post(url, "/generate", body)
    triples = answer["meta_info"]["input_token_logprobs"]
    if [triple[1] for triple in triples] != list(token_ids):
        raise ServerError(f"{url} gave log-probs of {len(triples)} other tokens than the {len(token_ids)} of the probe")
    return np.array([0.0, *(triple[0] for triple in triples[1:])], np.float32)


async def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
            async with session.post(url + path, json=body) as answer:
                if answer.status != 200:
                    raise ServerError(f"{url}{path} answered HTTP {answer.status}: {(await answer.text())[:300]}")
                return await answer.json()
    except (aiohttp.ClientError, TimeoutError, OSError) as exc:
        raise ServerError(f"{url}{path} gave no answer: {exc or type(exc).__name__}") from None
