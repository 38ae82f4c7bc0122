"""The policy loss: a pure function of packed tensors, plus the weight each token carries in it.

    loss = sum over all tokens of the mini-batch of  weight_t * term_t

The weights come from the whole (global) mini-batch and hold mask, aggregation, off-policy correction and the global
divisor, so how the tokens are cut into micro-batches, packed or spread over ranks changes nothing but rounding.
[T] = packed tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from torl_mega.algo.correction import correction_weights
from torl_mega.config import AlgoConfig
from torl_mega.types import TrainSample


def loss_weights(batch: Sequence[TrainSample], config: AlgoConfig, *, max_response_tokens: int) -> list[np.ndarray]:
    """Per sample [T] float32, 0 on tokens that are not trained.

    `token_mean`: 1 / (trained tokens of the mini-batch) (DAPO 2503.14476 eq. 8);
    `seq_mean_token_mean`: 1 / (sequences * trained tokens of this sequence) (GRPO 2402.03300 eq. 3);
    `seq_mean_token_sum_norm`: 1 / (sequences * max_response_tokens) (Dr. GRPO 2503.20783).
    Sequences without a trained token (filtered ones) count in no divisor.
    """
    lengths = [int(b.sample.loss_mask.sum()) for b in batch]
    num_tokens, num_sequences = max(sum(lengths), 1), max(sum(n > 0 for n in lengths), 1)
    per_token = {
        "token_mean": lambda n: 1.0 / num_tokens,
        "seq_mean_token_mean": lambda n: 1.0 / (num_sequences * max(n, 1)),
        "seq_mean_token_sum_norm": lambda n: 1.0 / (num_sequences * max_response_tokens),
    }[config.loss_agg]
    return [
        (b.sample.loss_mask * np.float32(per_token(n)) * correction_weights(b, config)).astype(np.float32)
        for b, n in zip(batch, lengths, strict=True)
    ]


def policy_loss(
    *,
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    ref_logprobs_T: torch.Tensor | None,
    advantages_T: torch.Tensor,
    weights_T: torch.Tensor,
    config: AlgoConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (PPO 1707.06347 eq. 7, sides apart as in DAPO), minus entropy, plus k3 KL to the start.

    Only `logprobs_T` and `entropy_T` carry gradient. Returns the weighted sum and detached metric sums that add up
    over micro-batches and ranks; keys that end in `_max` combine by maximum.
    """
    trained = weights_T != 0
    # a masked token's log-prob may be anything; keep exp() of it out of the sum and out of the gradient
    log_ratio = torch.where(trained, logprobs_T - old_logprobs_T, torch.zeros_like(logprobs_T))
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.maximum(-advantages_T * ratio, -advantages_T * clipped)
    terms = surrogate
    if config.entropy_coef:
        terms = terms - config.entropy_coef * entropy_T
    sums = {
        "loss": surrogate.detach(),
        "entropy": entropy_T.detach(),
        "clip_frac": ((-advantages_T * clipped) > (-advantages_T * ratio)).to(logprobs_T.dtype).detach(),
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).detach(),
    }
    if config.kl_coef and ref_logprobs_T is not None:
        gap = torch.where(trained, ref_logprobs_T - logprobs_T, torch.zeros_like(logprobs_T))
        kl = torch.expm1(gap) - gap
        terms = terms + config.kl_coef * kl
        sums["ref_kl"] = kl.detach()
    zero = torch.zeros_like(weights_T)
    metrics = {name: torch.where(trained, weights_T * value, zero).sum() for name, value in sums.items()}
    metrics["ratio_max"] = torch.where(trained, ratio.detach(), zero).max() if ratio.numel() else zero.sum()
    return torch.where(trained, weights_T * terms, zero).sum(), metrics
