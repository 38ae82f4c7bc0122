"""The router of a layer with experts: Hugging Face's formula in Megatron's place, and the loss that balances experts.

    hidden states [t, H] ─► logits ─► softmax over all experts, fp32 ─► the k largest ─► / their sum, if the model says so
                                                                              └► weights [t, E] and map [t, E] for Megatron

Contract: the probabilities are those of `transformers` (modeling_qwen3_moe.py, modeling_qwen2_moe.py of 5.19): softmax in fp32
over all experts, then the choice, ties to the lower expert. No token is dropped. The balance loss, off at coefficient 0, is
taken per sequence (2412.19437, section 2.1.2), so that packing and layout do not change it:

    coefficient * sum over layers and sequences s of (T_s / T) * E / k * sum over experts e of f_e(s) * P_e(s)

with T tokens of the whole mini-batch, T_s those of the sequence, f_e the fraction of choices that fell on e and P_e the mean
probability. 1 per layer when balanced.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter

from torl_mega.layout import Experts


@dataclass(frozen=True, eq=False)
class RouterInputs:
    """What the routers of a micro-batch need to know of its t tokens on this rank (all tensor ranks together)."""

    sequence: torch.Tensor  # [t] int64 number of each token's sequence in the micro-batch, -1 on padding
    num_sequences: int


class HfRouter(TopKRouter):
    """See the module's docstring. Made of Megatron's router by `install`."""

    experts: Experts
    fp32: bool

    def forward(self, input: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[s, 1, H] -> weights [s, E] and which experts are chosen [s, E]."""
        del padding_mask
        hidden = input.flatten(0, -2)
        dtype = torch.float32 if self.fp32 else hidden.dtype
        logits = F.linear(hidden.to(dtype), self.weight.to(dtype))
        probabilities = logits.softmax(-1, dtype=torch.float32)
        top, chosen = probabilities.topk(self.experts.top_k, dim=-1)
        if self.experts.normalized:
            top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(1, chosen, top)
        used = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, chosen, True)
        return weights.to(logits.dtype), used


def install(chunks: Sequence[Any], experts: Experts, *, fp32: bool) -> None:
    """Puts our router in the place of Megatron's in every layer; the weights stay."""
    for router in routers_of(chunks):
        router.__class__ = HfRouter
        router.experts, router.fp32 = experts, fp32


def routers_of(chunks: Sequence[Any]) -> list[Any]:
    """The routers of this rank's layers, in order."""
    return [layer.mlp.router for chunk in chunks for layer in chunk.decoder.layers]
