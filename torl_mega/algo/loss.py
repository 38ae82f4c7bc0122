"""The policy loss: a pure function of packed tensors.

    loss = sum over all tokens of the mini-batch of  weight_t * term_t        (weights: algo/weights.py)

    ratio_t = exp(log p_t - log p_old,t), clamped before exp, so no token makes the loss or a gradient infinite
    ppo     max(-A r, -A clip(r));  with dual_clip c and A < 0 at most -A c     1707.06347 eq. 7, 1912.09729 eq. 5
    gspo    the same with r the sequence's geometric-mean ratio                 2507.18071 eq. 5-7
    cispo   -A sg(clip(r)) log p: every token keeps its gradient                2506.13585 eq. 4-5

[T] = packed tokens of one micro-batch, [N] = sequences of the mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torl_mega.algo.kl import LOG_RATIO_LIMIT, kl_estimate
from torl_mega.config import AlgoConfig


@dataclass(frozen=True, slots=True)
class Sequences:
    """To which sequence each token belongs; `gspo` needs it. `reduce` sums [N] over the ranks that hold parts of the same
    sequences (context parallelism)."""

    ids_T: torch.Tensor  # [T] int64
    lengths_N: torch.Tensor  # [N] trained tokens of each sequence, on all ranks
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums


def policy_loss(
    *,
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    ref_logprobs_T: torch.Tensor | None,
    advantages_T: torch.Tensor,
    weights_T: torch.Tensor,
    shares_T: torch.Tensor,
    config: AlgoConfig,
    sequences: Sequences | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The surrogate of `config.loss`, minus entropy, plus KL to the reference.

    Only `logprobs_T` and `entropy_T` carry gradient. Returns the weighted sum and detached metric sums that add up over
    micro-batches and ranks: `loss` by the loss weights, the others by `shares_T`, as means over trained tokens; keys that
    end in `_max` combine by maximum.
    """
    trained = shares_T != 0
    zero = torch.zeros_like(weights_T)
    # a masked token's log-prob may be anything; keep exp() of it out of the sum and out of the gradient
    log_ratio = of_token = torch.where(trained, logprobs_T - old_logprobs_T, zero)
    if config.loss == "gspo":
        assert sequences is not None
        log_ratio = _sequence_log_ratio(log_ratio, sequences)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate, is_clipped = _surrogate(ratio, logprobs_T, advantages_T, config)
    terms = surrogate
    if config.entropy_coef:
        terms = terms - config.entropy_coef * entropy_T
    means = {
        "entropy": entropy_T.detach(),
        "clip_frac": is_clipped.to(logprobs_T.dtype),
        "approx_kl": kl_estimate(of_token.detach(), "k3", torch),
    }
    if config.kl_coef and ref_logprobs_T is not None:
        kl = kl_estimate(torch.where(trained, ref_logprobs_T - logprobs_T, zero), config.kl_estimator, torch)
        if config.kl_in == "loss":
            terms = terms + config.kl_coef * kl
        means["ref_kl"] = kl.detach()
    metrics = {name: torch.where(trained, shares_T * value, zero).sum() for name, value in means.items()}
    counted = weights_T != 0
    metrics["loss"] = torch.where(counted, weights_T * surrogate.detach(), zero).sum()
    metrics["ratio_max"] = torch.where(trained, ratio.detach(), zero).max() if ratio.numel() else zero.sum()
    return torch.where(counted, weights_T * terms, zero).sum(), metrics


def token_mismatch(
    logprobs_T: torch.Tensor, rollout_T: torch.Tensor, shares_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`correction.mismatch` without its quantiles, as metric sums of one micro-batch."""
    gap = torch.where(shares_T != 0, logprobs_T - rollout_T, torch.zeros_like(logprobs_T))
    return {
        "mean_abs_logprob_diff": (shares_T * gap.abs()).sum(),
        "abs_logprob_diff_max": gap.abs().max() if gap.numel() else gap.sum(),
        "k3": (shares_T * kl_estimate(gap, "k3", torch)).sum(),
    }


def _surrogate(
    ratio: torch.Tensor, logprobs_T: torch.Tensor, advantages_T: torch.Tensor, config: AlgoConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(term of each token, whether the clip decides it), both [T]."""
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.loss == "cispo":
        weight = clipped.detach()
        return -advantages_T * weight * logprobs_T, weight != ratio.detach()
    plain, bounded = -advantages_T * ratio, -advantages_T * clipped
    term, is_clipped = torch.maximum(plain, bounded), bounded > plain
    if config.dual_clip is not None:
        most = torch.where(advantages_T < 0, -advantages_T * config.dual_clip, torch.inf)
        term, is_clipped = torch.minimum(term, most), is_clipped | (term > most)
    return term, is_clipped.detach()


def _sequence_log_ratio(log_ratio: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """[T] mean log-ratio of each token's sequence, with the gradient of the token's own log-prob (GSPO-token, eq. 14):
    summed over a sequence with equal advantages it is the sequence's gradient, and needs no gradient across ranks."""
    own = log_ratio.detach()
    sums = torch.zeros(sequences.lengths_N.shape, dtype=own.dtype, device=own.device)
    sums = sequences.reduce(sums.index_add(0, sequences.ids_T, own))
    means = sums / sequences.lengths_N.clamp(min=1)
    return means[sequences.ids_T] + (log_ratio - own)
