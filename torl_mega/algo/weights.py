"""What each token counts in the loss: mask, aggregation, off-policy correction and the divisor of the whole mini-batch.

The weights come from the whole (global) mini-batch, so how its tokens are cut into micro-batches, packed or spread over
ranks changes nothing but rounding. Pure numpy; [T] = tokens of one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from torl_mega.algo.correction import correction_weights
from torl_mega.config import AlgoConfig
from torl_mega.types import TrainSample


def loss_weights(batch: Sequence[TrainSample], config: AlgoConfig, *, max_response_tokens: int) -> list[np.ndarray]:
    """Per sample [T] float32, 0 on tokens that are not trained.

    `token_mean`: 1 / (trained tokens of the mini-batch) (DAPO 2503.14476 eq. 8);
    `seq_mean_token_mean`: 1 / (sequences * trained tokens of this sequence) (GRPO 2402.03300 eq. 3);
    `seq_mean_token_sum_norm`: 1 / (sequences * max_response_tokens) (Dr. GRPO 2503.20783);
    `prompt_mean`: 1 / (prompts * trained tokens of this prompt's sequences) (ScaleRL 2510.13786).
    Sequences and prompts without a trained token (filtered ones) count in no divisor.
    """
    lengths = [int(b.sample.loss_mask.sum()) for b in batch]
    num_tokens, num_sequences = max(sum(lengths), 1), max(sum(n > 0 for n in lengths), 1)
    of_prompt: Counter[int] = Counter()
    for item, length in zip(batch, lengths, strict=True):
        of_prompt[item.sample.group] += length
    num_prompts = max(sum(n > 0 for n in of_prompt.values()), 1)
    per_token = {
        "token_mean": lambda n, group: 1.0 / num_tokens,
        "seq_mean_token_mean": lambda n, group: 1.0 / (num_sequences * max(n, 1)),
        "seq_mean_token_sum_norm": lambda n, group: 1.0 / (num_sequences * max_response_tokens),
        "prompt_mean": lambda n, group: 1.0 / (num_prompts * max(of_prompt[group], 1)),
    }[config.loss_agg]
    return [
        (b.sample.loss_mask * np.float32(per_token(n, b.sample.group)) * correction_weights(b, config)).astype(
            np.float32
        )
        for b, n in zip(batch, lengths, strict=True)
    ]


def token_shares(batch: Sequence[TrainSample]) -> list[np.ndarray]:
    """Per sample [T] float32: 1 / (trained tokens of the mini-batch) on each of them. What a logged mean weighs tokens
    with, whatever they count in the loss."""
    num_tokens = max(sum(int(b.sample.loss_mask.sum()) for b in batch), 1)
    return [(b.sample.loss_mask * np.float32(1.0 / num_tokens)).astype(np.float32) for b in batch]
