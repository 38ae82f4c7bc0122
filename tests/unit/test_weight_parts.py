"""Checksums, buckets, answers and seams: the parts of serving that need no server."""

from __future__ import annotations

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torl_mega.serving.generation import BadAnswer, parse_answer, seam_suffixes
from torl_mega.serving.plugin.checksum import ROW, checksum, word_sum
from torl_mega.serving.plugin.held_weights import spec_line
from torl_mega.serving.sync.buckets import make_buckets
from torl_mega.serving.sync.verify import parse_key
from torl_mega.types import FinishReason, GenerationRequest


def both(tensor: torch.Tensor) -> tuple[str, int]:
    """The CPU's checksum, and the GPU's, which is plain torch and runs here as well."""
    return checksum(tensor, "cpu"), word_sum(tensor.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("numel", [1, 3, ROW - 1, ROW, ROW + 1, 3 * ROW + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_flipped_bit_changes_the_checksum(numel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    tensor = torch.randint(0, 100, (numel,), generator=generator).to(dtype)
    before = both(tensor)
    assert before == both(tensor.clone())
    data = tensor.view(torch.uint8)
    for position in {0, data.numel() // 2, data.numel() - 1}:
        for bit in (0, 7):
            changed = tensor.clone()
            changed.view(torch.uint8)[position] ^= 1 << bit
            assert all(a != b for a, b in zip(both(changed), before, strict=True))


def test_signs_swaps_and_lengths_count() -> None:
    tensor = torch.arange(1.0, 5.0)
    variants = [
        tensor,
        -tensor,
        tensor * torch.tensor([-1.0, 1, -1, 1]),
        tensor * torch.tensor([1.0, -1, 1, -1]),
        tensor.flip(0),
        torch.cat([tensor, torch.zeros(1)]),
        torch.zeros(4),
        torch.zeros(8),
    ]
    assert len({both(v)[0] for v in variants}) == len(variants)
    assert len({both(v)[1] for v in variants}) == len(variants)


def test_a_view_has_the_checksum_of_its_elements() -> None:
    table = torch.arange(60, dtype=torch.float32).view(6, 10)
    for view in (table[:, 3:7], table[2:4], table.t(), table[1:, 1::2]):
        assert both(view) == both(view.clone())
    raw = torch.arange(64, dtype=torch.uint8)
    assert word_sum(raw[1:33]) == word_sum(raw[1:33].clone())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]),
            st.lists(st.integers(1, 5), max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 200),
)
def test_buckets_hold_every_tensor_once_aligned_and_bounded(
    shapes: list[tuple[torch.dtype, list[int]]], limit: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    named = [
        (f"t{i}", torch.randint(0, 100, shape, generator=generator).to(dtype))
        for i, (dtype, shape) in enumerate(shapes)
    ]
    seen = []
    for bucket in make_buckets(iter(named), limit):
        assert bucket.num_bytes <= limit or len(bucket.named) == 1
        flat = bucket.flatten_into(torch.zeros(bucket.num_bytes + 8, dtype=torch.uint8))
        offset = 0
        for name, tensor in bucket.named:
            assert offset % tensor.element_size() == 0
            piece = flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            assert checksum(piece, "cpu") == checksum(tensor, "cpu")
            offset += tensor.nbytes
            seen.append(name)
        assert offset == bucket.num_bytes == flat.numel()
    assert sorted(seen) == sorted(name for name, _ in named)


def test_slice_keys_read_back() -> None:
    assert parse_key("model.a@b.weight@12:3,4:8,1:bfloat16") == ("model.a@b.weight", 12, (3, 4), (8, 1), "bfloat16")
    assert spec_line("w", "float32", torch.Size([2, 3])) == "w float32 2,3"
    assert spec_line("scale", "float32", ()) == "scale float32"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", ()),
        ("x```", ("output",)),
        ("``", ("`output",)),
        ("```outpu", ("t",)),
        ("```output", ()),
        ("", ()),
        ("a`", ("``output",)),
    ],
)
def test_what_would_complete_a_stop_string(text: str, expected: tuple[str, ...]) -> None:
    found = seam_suffixes(text, ("```output",))
    assert set(expected) <= set(found)
    for suffix in found:
        assert (text + suffix).endswith("```output")


REQUEST = GenerationRequest((1,), 9, 1.0, 1.0, ("STOP",), 0, "k")


def answer(finish: dict[str, object], text: str = "abc", **changes: object) -> bytes:
    meta = {
        "finish_reason": finish,
        "output_token_logprobs": [[-0.5, 4, None], [-0.25, 5, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
    }
    return orjson.dumps({"text": text, "output_ids": [4, 5], "meta_info": meta | changes})


def test_finish_reasons_of_real_answers() -> None:
    cases = [
        ({"type": "length", "length": 2}, FinishReason.LENGTH),
        ({"type": "stop", "matched": 264}, FinishReason.EOS),
        ({"type": "stop", "matched": "STOP"}, FinishReason.STOP_STRING),
        ({"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}, FinishReason.ABORT),
    ]
    for finish, expected in cases:
        part = parse_answer(answer(finish), REQUEST, (), budget=9)
        assert part.finish is expected
        assert part.policy_versions == (3, 4)
        assert part.logprobs == (-0.5, -0.25)


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"null", b"{}", b"[]",
        answer({"type": "novel"}),
        answer({"type": "length"}, weight_versions=[]),
        answer({"type": "length"}, weight_versions=[{"version": "3", "start": 1, "end": 2}]),
        answer({"type": "length"}, output_token_logprobs=[[-1.0, 4, None]]),
        answer({"type": "length"}, output_token_logprobs=[[-1.0, 4, None], [1.0, 5, None]]),
        answer({"type": "length"}, output_token_logprobs=[[None, 4, None], [-1.0, 5, None]]),
    ],
)  # fmt: skip
def test_an_answer_that_contradicts_itself_is_refused(payload: bytes) -> None:
    with pytest.raises(BadAnswer) as caught:
        parse_answer(payload, REQUEST, (), budget=9)
    assert caught.value.kind == "bad_answer"
    with pytest.raises(BadAnswer, match="at most 1"):
        parse_answer(answer({"type": "length", "length": 2}), REQUEST, (), budget=1)
