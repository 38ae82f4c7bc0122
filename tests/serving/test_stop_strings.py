"""Stop strings end a request at the first token with which its text contains one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from transformers import AutoTokenizer

from torl_mega.serving.plugin import stop_strings

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart"
TOKENIZER: Any = AutoTokenizer.from_pretrained(QUICKSTART)
SEARCHES: list[int] = []


def original(request: Any, new_accepted_len: int) -> bool:
    SEARCHES.append(len(request.output_ids))
    return Req._check_str_based_finish(request, new_accepted_len)


def reference(tokens: list[int], stops: list[str]) -> tuple[int, Any, Any] | None:
    """As `finish`, by the whole text after every token."""
    for count in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:count])
        if matched := [stop for stop in stops if stop in text]:
            return count, {"type": "stop", "matched": matched[0]}, count
    return None


def finish(tokens: list[int], stops: list[str]) -> tuple[int, Any, Any] | None:
    """(tokens until it, matched, finished_len) of the first stop string, or None."""
    request: Any = object.__new__(Req)
    request.sampling_params = SamplingParams(stop=stops, max_new_tokens=len(tokens))
    request.sampling_params.normalize(TOKENIZER)
    request.tokenizer, request.decoded_text, request.output_ids = TOKENIZER, "", []
    request.finished_reason = request.finished_len = None
    for token in tokens:
        request.output_ids.append(token)
        if stop_strings.check(original, request, 1):
            return len(request.output_ids), request.finished_reason.to_json(), request.finished_len
    return None


STOPS = st.lists(st.sampled_from(["```output", "\n", "ab", "é", "漢", " x", "t", "``` "]), min_size=0, max_size=3)
TEXT = st.text(st.sampled_from("`outpab é漢x\n "), max_size=60)


@given(TEXT, st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=20), STOPS)
@settings(max_examples=300, deadline=None)
def test_the_same_token_ends_a_request(text: str, ids: list[int], stops: list[str]) -> None:
    tokens = [*ids, *TOKENIZER.encode(text), *ids]
    assert finish(tokens, stops) == reference(tokens, stops)


def test_a_stop_string_is_found_however_it_is_spelled() -> None:
    stop = "```output"
    spelled = TOKENIZER.convert_tokens_to_ids(list(stop))
    assert len(spelled) == len(stop) > len(TOKENIZER.encode(stop)) + 1
    tokens = [*TOKENIZER.encode("x = 1\n"), *spelled]
    assert finish(tokens, [stop]) == (len(tokens), {"type": "stop", "matched": stop}, len(tokens))


def test_most_tokens_need_no_search() -> None:
    tokens = TOKENIZER.encode("\n```python\nprint(12*34)\n```\n```output")
    SEARCHES.clear()
    assert finish(tokens, ["```output"]) is not None
    assert len(SEARCHES) < len(tokens) / 2


@pytest.mark.parametrize("stop", ["x ", "", "\n"])
def test_what_decoders_move_is_always_looked_for(stop: str) -> None:
    assert stop_strings.can_end(stop, "q")
