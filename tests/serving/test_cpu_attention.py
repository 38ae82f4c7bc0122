"""The CPU servers' batched attention inside Hugging Face's models, as a server drives it, against their own attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torl_mega.serving.plugin import cpu_attention
from torl_mega.serving.plugin.cpu_attention import BatchedAttention, Group, plan

VOCAB, POOL, MAX_LENGTH = 320, 20000, 4096
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}  # fmt: skip
SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 1, "head_dim": 32}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
}


class Server:
    """A model whose layers keep keys and values in a pool and attend through `BatchedAttention`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.backend: Any = object.__new__(BatchedAttention)
        config, head = model.config, model.model.layers[0].self_attn.head_dim
        shape = (len(model.model.layers), 2, POOL, config.num_key_value_heads, head)
        self.pool = torch.full(shape, torch.nan, dtype=model.dtype)  # whoever reads what was never written shows it
        self.free = torch.randperm(POOL, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        self.req_to_token = torch.zeros(64, MAX_LENGTH, dtype=torch.int32)
        self.lengths = np.zeros(64, np.int64)

    def run(self, requests: Sequence[int], pieces: Sequence[torch.Tensor], *, decode: bool = False) -> torch.Tensor:
        """Feeds request i the tokens `pieces[i]`, behind what it has been fed. Logits [tokens, V] of all of them."""
        new = np.array([len(piece) for piece in pieces])
        before = self.lengths[list(requests)].copy()
        slots, self.free = self.free[: new.sum()], self.free[new.sum() :]
        for request, old, part in zip(requests, before, slots.split(new.tolist()), strict=True):
            self.req_to_token[request, old : old + len(part)] = part
        self.lengths[list(requests)] += new
        places = torch.tensor([old + i for old, count in zip(before, new, strict=True) for i in range(count)])
        self.backend._groups = None  # as init_forward_metadata does

        def attend(module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any) -> Any:
            query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
            keys, values = self.pool[module.layer_idx]
            keys[slots.long()], values[slots.long()] = key, value
            output = torch.empty_like(query)
            table = (self.req_to_token, torch.tensor(requests), torch.from_numpy(before + new))
            common = {"scaling": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
            if decode:
                self.backend._run_sdpa_forward_decode(query, output, keys, values, *table, None, causal=False, **common)
            else:
                extents = (torch.from_numpy(before), torch.from_numpy(new))
                self.backend._run_sdpa_forward_extend(
                    query, output, keys, values, *table, *extents, None, causal=True, **common
                )
            return output[None], None

        ALL_ATTENTION_FUNCTIONS.register("torl_paged", attend)
        self.model.set_attn_implementation("torl_paged")
        with torch.no_grad():
            return self.model(torch.cat(list(pieces))[None], position_ids=places[None], use_cache=False).logits[0]


def make(shape: str, dtype: torch.dtype) -> Any:
    config_class, model_class, sizes = SHAPES[shape]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **sizes)).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.dim() > 1 else None
    return model


def reference(model: Any, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [model(t[None], use_cache=False).logits[0].float().log_softmax(-1) for t in tokens]


def served(model: Any, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probs of every token: new prompts, prompts behind a cached prefix, single tokens; ragged, in changing company."""
    server, found = Server(model), [torch.empty(len(t), VOCAB) for t in tokens]
    done = [0] * len(tokens)

    def feed(counts: dict[int, int], **how: bool) -> None:
        pieces = [tokens[i][done[i] : done[i] + n] for i, n in counts.items()]
        logits = server.run(list(counts), pieces, **how).float().log_softmax(-1)
        for (i, n), part in zip(counts.items(), logits.split(list(counts.values())), strict=True):
            found[i][done[i] : done[i] + n] = part
            done[i] += n

    total = [len(t) for t in tokens]
    feed({i: max(1, n // 3) for i, n in enumerate(total)})  # nothing cached
    feed({i: n // 2 for i, n in enumerate(total) if n > 8})  # all behind a prefix
    feed({i: n - d - 12 for i, (n, d) in enumerate(zip(total, done, strict=True)) if n - d > 12})
    while any(d < n for d, n in zip(done, total, strict=True)):
        feed({i: 1 for i, n in enumerate(total) if done[i] < n}, decode=True)
    return found


def gap(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def ragged(lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_batch_in_fp32_has_the_logprobs_of_hugging_face(shape: str) -> None:
    """Long enough that decoding needs several groups and that a mask has no room for a whole prompt."""
    tokens = ragged([1, 2, 7, 40, 41, 43, 90, 300, 1000, 3000, *range(60, 90)])
    model = make(shape, torch.float32)
    assert gap(served(model, tokens), reference(model, tokens)) < 2e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_batch_in_bf16_is_as_near_to_fp32_as_hugging_face(shape: str) -> None:
    tokens = ragged([1, 2, 7, 40, 41, 90, 300])
    exact = reference(make(shape, torch.bfloat16).float(), tokens)
    model = make(shape, torch.bfloat16)
    theirs, ours = (
        torch.cat([(a - b).abs().flatten() for a, b in zip(found, exact, strict=True)]).double()
        for found in (reference(model, tokens), served(model, tokens))
    )
    assert ours.square().mean() < 1.1 * theirs.square().mean()


def test_alone_a_request_repeats_bit_for_bit() -> None:
    model, (tokens,) = make("qwen2", torch.float32), ragged([200])
    first, second = served(model, [tokens]), served(model, [tokens])
    assert torch.equal(first[0], second[0])


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 2500)), min_size=1, max_size=40), st.integers(1, 4096))
@settings(max_examples=25, deadline=None)
def test_a_plan_is_bounded_and_has_every_query_once(batch: list[tuple[int, int]], width: int) -> None:
    before, new = (np.array(column) for column in zip(*batch, strict=True))
    table = torch.arange(len(batch) * 8192, dtype=torch.int32).view(len(batch), 8192)
    groups = list(plan(before, new, table, torch.arange(len(batch)), width))
    found: list[tuple[int, int]] = []
    for group in groups:
        n, q, t = group.shape
        assert n * t * width <= cpu_attention.GATHERED or n == 1
        mask = group.mask()
        assert mask is None or mask.numel() <= cpu_attention.MASKED or q == 1
        found += queries(group, before, new)
    assert sorted(found) == [(i, k) for i, (_, count) in enumerate(batch) for k in range(count)]


def queries(group: Group, before: np.ndarray, new: np.ndarray) -> list[tuple[int, int]]:
    """(request, query) of every real query, after a look at what it sees."""
    n, q, t = group.shape
    rows = np.arange(new.sum()) if group.queries is None else group.queries.numpy()
    real = range(n * q) if group.real is None else group.real.tolist()
    assert group.rows is None or np.array_equal(group.rows.numpy(), rows[list(real)])
    starts, slots, mask = np.cumsum(new) - new, group.slots.view(n, t), group.mask()
    found = []
    for at in real:
        request = int(np.searchsorted(starts, rows[at], "right")) - 1
        query = int(rows[at] - starts[request])
        sees = before[request] + query + 1
        assert bool((slots[at // q, :sees] == torch.arange(sees) + request * 8192).all())
        if mask is not None:
            assert bool(mask[at // q, 0, at % q, :sees].all())
            assert not bool(mask[at // q, 0, at % q, sees:].any())
        else:
            assert sees == (at % q + 1 if group.causal else t)
        found.append((request, query))
    return found


def test_a_sliding_window_is_left_to_sglang() -> None:
    """A request of nine tokens of which a query sees itself and the two before it."""
    generator = torch.Generator().manual_seed(3)
    keys, values, query = (torch.randn(10, 2, 8, generator=generator) for _ in range(3))
    table, lengths = torch.arange(1, 10, dtype=torch.int32)[None], torch.tensor([9])
    backend: Any = object.__new__(BatchedAttention)
    new, last = torch.empty(9, 2, 8), torch.empty(1, 2, 8)
    common = {"sliding_window_size": 2, "scaling": 0.5, "enable_gqa": False}
    extents = (torch.tensor([0]), torch.tensor([9]))
    pool = (keys, values, table, torch.tensor([0]), lengths)
    backend._run_sdpa_forward_extend(query[1:], new, *pool, *extents, None, causal=True, **common)
    backend._run_sdpa_forward_decode(query[9:], last, *pool, None, causal=False, **common)
    for at in range(9):
        seen = slice(max(0, at - 2) + 1, at + 2)
        weights = torch.einsum("hd,thd->ht", query[at + 1], keys[seen]).mul(0.5).softmax(-1)
        expected = torch.einsum("ht,thd->hd", weights, values[seen])
        assert torch.allclose(new[at], expected, atol=1e-5)
    assert torch.allclose(last[0], new[8], atol=1e-5)
