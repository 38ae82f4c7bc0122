"""The router of a layer with experts: Hugging Face's formula in Megatron's place, and the loss that balances experts.

    hidden states [t, H] ─► logits ─► softmax over all experts, fp32 ─► the k largest ─► / their sum, if the model says so
                                                                              └► weights [t, E] and map [t, E] for Megatron

With `RouterInputs.routes` the k experts of a token are those named there (router replay), and their weights still come from the
probabilities, so the router has its gradient.

Contract: the probabilities are those of `transformers` (modeling_qwen3_moe.py, modeling_qwen2_moe.py of 5.19): softmax in fp32
over all experts, then the choice. No token is dropped. The balance loss, off at coefficient 0, is taken per sequence (2412.19437,
section 2.1.2), so that packing and layout do not change it:

    coefficient * sum over layers and sequences s of (T_s / T) * E * sum over experts e of f_e(s) * P_e(s)

with T tokens of the whole mini-batch, T_s those of the sequence, f_e the fraction of its choices that fell on e and P_e the mean
probability of e. That is 1 per layer where all experts are chosen alike.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from torl_mega.layout import Experts


@dataclass(frozen=True, eq=False)
class RouterInputs:
    """What routers need to know of the t packed tokens of a micro-batch on this rank (all tensor ranks together)."""

    sequence: torch.Tensor  # [t] int64 number of each token's sequence in the micro-batch, -1 on padding
    lengths: torch.Tensor  # [sequences] tokens of each, all context ranks together
    aux_weight: float = 0.0  # coefficient of the balance loss / tokens of the mini-batch
    routes: torch.Tensor | None = None  # [t, layers, k] int16 experts to take, -1 = the router's own choice
    chosen: dict[int, torch.Tensor] | None = None  # where each layer (from 0) leaves what it took, [t of this rank, k]


class HfRouter(TopKRouter):
    """See the module's docstring. Made of Megatron's router by `install`."""

    experts: Experts
    fp32: bool
    inputs: RouterInputs  # of the micro-batch that is on its way through the layer
    load: torch.Tensor  # [E] tokens that went to each expert since it was last set to zero, padding left out
    replayed: torch.Tensor  # [2] likewise, choices that were given, and those of them that it would not have made

    def forward(self, input: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[s, 1, H] -> weights [s, E] and which experts are chosen [s, E]."""
        del padding_mask
        hidden = input.flatten(0, -2)
        dtype = torch.float32 if self.fp32 else hidden.dtype
        logits = F.linear(hidden.to(dtype), self.weight.to(dtype))
        probabilities = logits.softmax(-1, dtype=torch.float32)
        chosen = self._chosen(probabilities)
        top = probabilities.gather(1, chosen)
        if self.experts.normalized:
            top = top / top.sum(-1, keepdim=True)
        used = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, chosen, True)
        if torch.is_grad_enabled():
            top = self._balanced(top, probabilities, used)
        weights = torch.zeros_like(probabilities).scatter(1, chosen, top)
        return weights.to(logits.dtype), used

    def _chosen(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[s, k] the experts of each token: the k most probable, or those that were given."""
        own = probabilities.topk(self.experts.top_k, dim=-1).indices
        assert self.layer_number is not None
        chosen, inputs, layer = own, self.inputs, self.layer_number - 1
        if inputs.routes is not None:
            given = part_of(inputs.routes)[:, layer].long()
            known = given[:, :1] >= 0
            chosen = torch.where(known, given, own)
            if torch.is_grad_enabled():
                kept = (given[:, :, None] == own[:, None]).any(-1) | ~known
                self.replayed += torch.stack([known.sum() * given.size(1), (~kept).sum()])
        if inputs.chosen is not None:
            inputs.chosen[layer] = chosen.to(torch.int16)
        return chosen

    def _balanced(self, top: torch.Tensor, probabilities: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """`top`, with the gradient of the balance loss hung on; counts the load."""
        inputs, sequence = self.inputs, part_of(self.inputs.sequence)
        real = sequence >= 0
        self.load += (used & real[:, None]).sum(0)
        if not inputs.aux_weight:
            return top
        rows = sequence[real]
        chosen = probabilities.new_zeros(inputs.lengths.numel(), self.experts.count)
        chosen.index_add_(0, rows, used[real].to(chosen.dtype))
        if self.tp_cp_group.size() > 1:  # the ranks that hold the other tokens of these sequences
            dist.all_reduce(chosen, group=self.tp_cp_group)
        fractions = chosen / (self.experts.top_k * inputs.lengths[:, None])
        loss = (fractions[rows] * probabilities[real]).sum() * self.experts.count * inputs.aux_weight
        return _WithLoss.apply(top, loss)


def part_of(per_token: torch.Tensor) -> torch.Tensor:
    """This tensor rank's part of what is per token of all of them; with experts their tokens are always split (layout.py)."""
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return per_token.chunk(size)[rank]


class _WithLoss(torch.autograd.Function):
    """Passes the first argument on, and gives the second, a loss, the gradient 1. Our losses carry their divisors, so the scale
    that Megatron's own would need at every micro-batch is nothing to set here."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        del loss
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient, gradient.new_ones(())


def install(chunks: Sequence[Any], experts: Experts, *, fp32: bool) -> None:
    """Puts our router in the place of Megatron's in every layer; the weights stay. Each layer tells its router of the
    micro-batch that it is given, in a recomputation too."""
    for layer in _layers(chunks):
        router = layer.mlp.router
        router.__class__ = HfRouter
        router.experts, router.fp32 = experts, fp32
        router.load = torch.zeros(experts.count, dtype=torch.int64, device=router.weight.device)
        router.replayed = router.load.new_zeros(2)
        layer.register_forward_pre_hook(_tell_router, with_kwargs=True)


def _tell_router(layer: Any, args: Any, kwargs: Any) -> None:
    layer.mlp.router.inputs = kwargs["packed_seq_params"].router_inputs


def load_metrics(chunks: Sequence[Any], num_layers: int) -> dict[str, float]:
    """Collective: how evenly tokens went to experts since the last call. `experts/max_load`: the busiest expert of any layer
    against the mean; `experts/entropy`: of the choices, mean over layers, 1 when even; `experts/idle`: experts that no token
    went to; `experts/replay_changes`, of choices that were replayed: those that the trainer would not have made."""
    routers = [layer.mlp.router for layer in _layers(chunks)]
    table = routers[0].load.new_zeros(num_layers, routers[0].experts.count)
    for router in routers:
        table[router.layer_number - 1] = router.load
        router.load.zero_()
    replayed = torch.stack([router.replayed for router in routers]).sum(0)
    for router in routers:
        router.replayed.zero_()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(table)  # every token was on one rank
        dist.all_reduce(replayed)
    share = table.double() / table.sum(-1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(-1) / torch.tensor(float(share.size(1))).log()
    given, changed = replayed.tolist()
    return {
        **({"experts/replay_changes": changed / given} if given else {}),
        "experts/max_load": float(share.max()) * share.size(1),
        "experts/entropy": float(entropy.mean()),
        "experts/idle": float((table == 0).double().mean()),
    }


def _layers(chunks: Sequence[Any]) -> list[Any]:
    return [layer for chunk in chunks for layer in chunk.decoder.layers]
