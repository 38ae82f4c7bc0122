"""Log-probs of chosen tokens and entropies from hidden states, over a vocabulary sharded by tensor rank, in token chunks.

Contract: logits exist for `chunk` tokens at a time, `[chunk, V / tp]` in fp32; the backward pass computes them again
instead of keeping them (unless everything fits one chunk). Padded vocabulary rows get probability zero.
Megatron's own `vocab_parallel_cross_entropy` has no entropy and no chunks, writes into fp32 logits in place and counts
padding; its fused form returns bf16 gradients whatever the input is.

Shapes: n chosen rows, H hidden, V padded vocabulary / tp rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class _DeferredOutputLayer(ColumnParallelLinear):
    """Output layer that returns hidden states and remembers the weight: the loss projects, only the rows it needs."""

    def forward(self, input_: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None) -> Any:
        # in a tuple: a Parameter as attribute would register, and then be saved under a second name
        self.projection = (self.weight if weight is None else weight,)
        return input_, None


def defer_projection(model: Any) -> None:
    """Makes a GPTModel's last stage return hidden states instead of logits, so that the loss can project a chunk at a time."""
    if model.post_process:
        model.output_layer.__class__ = _DeferredOutputLayer


class _LogProbEntropy(torch.autograd.Function):
    """(hidden [n, H], weight [V, H], targets [n]) -> (log-prob [n], entropy [n]) of softmax(hidden weight^T / temperature)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        group: dist.ProcessGroup,
        valid_vocab: int,
        temperature: float,
        chunk: int,
        fp32: bool,
    ) -> Any:
        head = _Head(weight.float() if fp32 else weight, group, valid_vocab, temperature)
        logprobs, entropies, log_totals, means = [], [], [], []
        keep = None
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            z = head.logits(h)
            logprob, entropy, log_total, mean = head.reduce(z, y)
            logprobs.append(logprob)
            entropies.append(entropy)
            log_totals.append(log_total)
            means.append(mean)
            keep = z if hidden.size(0) <= chunk else None  # one chunk: the backward pass need not project again
        ctx.set_materialize_grads(False)
        ctx.head, ctx.chunk = head, chunk
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_totals), torch.cat(means), keep)
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, grad_logprob: Any, grad_entropy: Any) -> Any:  # type: ignore[override]
        hidden, weight, targets, log_total, mean, kept = ctx.saved_tensors
        head, chunk = ctx.head, ctx.chunk
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.size(0), chunk):
            rows = slice(start, min(start + chunk, hidden.size(0)))
            z = kept if kept is not None else head.logits(hidden[rows])
            z = z - log_total[rows, None]
            p = z.exp()
            grad = torch.zeros_like(p) if grad_logprob is None else p * -grad_logprob[rows, None]
            if grad_logprob is not None:
                index, mine = head.locate(targets[rows])
                grad.scatter_add_(1, index[:, None], (grad_logprob[rows] * mine)[:, None])
            if grad_entropy is not None:
                # dH/dlogit_j = -p_j (log p_j - sum p log p); padded rows have p = 0 and log p = -inf
                centred = torch.where(p > 0, z - mean[rows, None], torch.zeros_like(z))
                grad.addcmul_(p * centred, -grad_entropy[rows, None])
            grad = grad.div_(head.temperature).to(head.weight.dtype)
            grad_hidden[rows] = (grad @ head.weight).to(hidden.dtype)
            grad_weight += (grad.T @ hidden[rows].to(grad.dtype)).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None


class _Head:
    """The rows of the vocabulary that this rank holds."""

    def __init__(self, weight: torch.Tensor, group: dist.ProcessGroup, valid_vocab: int, temperature: float) -> None:
        self.weight, self.group, self.temperature = weight, group, temperature
        self.rows = weight.size(0)
        self.first = group.rank() * self.rows
        self.padded_from = max(valid_vocab - self.first, 0) if self.first + self.rows > valid_vocab else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] fp32, -inf on padding."""
        z = (hidden.to(self.weight.dtype) @ self.weight.T).float()
        if self.temperature != 1.0:
            z = z / self.temperature
        if self.padded_from is not None:
            z[:, self.padded_from :] = float("-inf")
        return z

    def locate(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of each target on this rank (clamped), and whether it is here."""
        local = targets - self.first
        return local.clamp(0, self.rows - 1), (local >= 0) & (local < self.rows)

    def reduce(self, z: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """log-prob, entropy, log of the partition sum, and sum p log p, all [n] over the whole vocabulary."""
        top = z.max(-1).values
        parallel = self.group.size() > 1
        if parallel:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        index, mine = self.locate(targets)
        chosen = torch.where(mine, z.gather(-1, index[:, None]).squeeze(-1) - top, torch.zeros_like(top))
        shifted = z - top[:, None]
        p = shifted.exp()
        # the clamp keeps padded rows, where p is 0 and log p -inf, from adding NaN
        weighted = p * shifted if self.padded_from is None else p * shifted.clamp(min=-1e30)
        sums = torch.stack([chosen, p.sum(-1), weighted.sum(-1)])
        if parallel:
            dist.all_reduce(sums, group=self.group)
        chosen, total, dot = sums
        log_sum, mean = total.log(), dot / total
        return chosen - log_sum, log_sum - mean, top + log_sum, mean - log_sum


def token_logprobs(
    model: Any,
    output: torch.Tensor,  # [1, s, H], s over tensor ranks under sequence parallelism
    rows: torch.Tensor,  # [n] positions whose next token is wanted
    targets: torch.Tensor,  # [n] those tokens
    *,
    valid_vocab: int,
    temperature: float,
    chunk: int,
    fp32: bool = False,  # project in fp32 whatever the weights are, at the cost of an fp32 copy of them
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [n], entropies [n]) in fp32 for the output of a model with `defer_projection`."""
    layer = model.output_layer
    hidden = output[0]
    if layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    group = parallel_state.get_tensor_model_parallel_group()
    return _LogProbEntropy.apply(
        hidden.index_select(0, rows), layer.projection[0], targets, group, valid_vocab, temperature, chunk, fp32
    )  # type: ignore[return-value]
