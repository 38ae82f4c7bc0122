"""Looks for stop strings only where one can have ended: SGLang decodes the tail of every request at every step for it.

A stop string that appears with a new token ends inside that token's text, so its last character is in there. What one
token alone decodes to is remembered; tokens that are a part of a character count as able to end anything, and a stop
string that ends in white space, which decoders strip or move, is always looked for. The search itself stays SGLang's, in
more tokens: its tail is as long as the tokenizer's own spelling of the stop string, and a policy may sample a longer one
(sgl-project/sglang#36698), at most a token for each byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

PART = "\N{REPLACEMENT CHARACTER}"


def check(original: Callable[..., bool], request: Any, new_accepted_len: int = 1) -> bool:
    """AROUND hook on `Req._check_str_based_finish` (SGLang srt/managers/schedule_batch.py)."""
    params = request.sampling_params
    if new_accepted_len == 1 and not (params.stop_regex_strs or request.decoded_text):
        if not params.stop_strs:
            return False
        text = text_of(request.tokenizer, request.output_ids[-1])
        if not any(can_end(stop, text) for stop in params.stop_strs):
            return False
    params.stop_str_max_len = max(params.stop_str_max_len, *(len(stop.encode()) for stop in params.stop_strs), 0)
    return original(request, new_accepted_len)


@functools.lru_cache(maxsize=1 << 18)
def text_of(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token])


def can_end(stop: str, text: str) -> bool:
    """Whether `stop` can end within a token of this text."""
    return not stop or stop[-1].isspace() or stop[-1] in text or PART in text
