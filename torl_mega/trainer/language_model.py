"""The loss of a language model in the trainer's packed micro-batches: mean negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torl_mega.trainer.megatron_trainer import MegatronTrainer
from torl_mega.trainer.micro_batch import MicroBatch
from torl_mega.types import Sample


def forward_backward(trainer: MegatronTrainer, samples: Sequence[Sample]) -> Mapping[str, float]:
    """Computes the gradients of the samples' mean over all tokens that `loss_mask` names, however they are packed. The
    trainer's temperature is that of its config and must be 1. Metrics: loss, entropy, and those of the packing."""
    num_trained = max(sum(int(s.loss_mask.sum()) for s in samples), 1)

    def loss_of(micro: MicroBatch, logprobs: torch.Tensor, entropies: torch.Tensor) -> Any:
        loss = -logprobs.sum() / num_trained  # also of no target at all, which keeps the graph that other ranks wait in
        return loss, {"loss": loss.detach(), "entropy": entropies.detach().sum() / num_trained}

    return trainer.gradients(samples, loss_of)
