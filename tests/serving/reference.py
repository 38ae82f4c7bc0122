"""The independent reference: Hugging Face's Qwen2 with weights of the test's choosing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from torl_mega.types import Generation


class Reference:
    def __init__(self, model: Path) -> None:
        torch.set_num_threads(1)
        self.model = Qwen2ForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
        self.names = [name for name, _ in self.model.named_parameters()]

    def original(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(weights, strict=False)

    def logprobs(self, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """[T] log-softmax(logits / temperature) of each response token."""
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            table = (self.model(ids).logits[0].float() / (temperature or 1.0)).log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        return table[rows, ids[0, len(prompt) :]]

    def max_gap(self, prompt: Sequence[int], generation: Generation, temperature: float = 1.0) -> float:
        expected = self.logprobs(prompt, generation.token_ids, temperature)
        return float((expected - torch.tensor(generation.logprobs)).abs().max())

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(num_tokens):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


def random_weights(like: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Other weights of the same shapes; norms stay around one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) * 0.1 + (1.0 if "norm" in name else 0.0)
        for name, weight in like.items()
    }
