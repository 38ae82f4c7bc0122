"""Independent reference for the parallel tests: plain `transformers` in fp32, one sequence at a time, torch AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torl_mega.types import Sample

TEMPERATURE = 0.7
ENTROPY_COEF = 0.01
CLIP = 0.2
OPTIM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-5}
WEIGHT_DECAY = 0.1
CLIP_GRAD = 0.05
STEPS = 3
VOCAB = 201  # odd: padded by every tensor size


MOE: dict[str, dict[str, Any]] = {
    "qwen3moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
        "experts_implementation": "eager",
    },
    "qwen2moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
        "experts_implementation": "eager",
    },
}  # fmt: skip


MOE_LAYERS = 4
AUX_COEF = {("qwen2moe", False): 0.05, ("qwen3moe", True): 0.05}  # by model; 0 for all others


def make_model(
    family: str, *, tied: bool, layers: int | None = None, dtype: torch.dtype = torch.float32, **extra: Any
) -> Any:
    """A small random HF model with non-trivial biases and norms, so that a wrong mapping shows."""
    import transformers

    layers = layers or (MOE_LAYERS if family in MOE else 8)

    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
        "initializer_range": 0.05,
        **extra,
    }
    if family.startswith("qwen3"):
        shared.setdefault("head_dim", 32)  # not hidden / heads
    if family in MOE:
        shared = {**MOE[family], **shared}
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "qwen2moe": "Qwen2Moe", "qwen3moe": "Qwen3Moe"}[
        family
    ]
    torch.manual_seed(7)
    config = getattr(transformers, name + "Config")(**shared)
    model = getattr(transformers, name + "ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.5)
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if key.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.2)  # so that tokens choose differently, and hardly ever at a near tie
    return model


def as_stored(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What transformers holds as one parameter, all experts of a layer, under the names of the checkpoint."""
    prefix, found, rest = name.partition(".experts.")
    if not found:
        yield name, tensor
        return
    parts = ("gate_proj", "up_proj") if rest == "gate_up_proj" else ("down_proj",)
    for number, expert in enumerate(tensor):
        for part, value in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{prefix}.experts.{number}.{part}.weight", value


def stored(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {k: t for name, tensor in named for k, t in as_stored(name, tensor)}


def save_model(model: Any, path: Path) -> None:
    model.save_pretrained(path)


def make_samples(seed: int, count: int = 14, longest: int = 40) -> list[Sample]:
    """Sequences of mixed length, one of a single token, with observations masked out in the middle."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        length = 1 if i == 3 else int(rng.integers(2, longest + 1))
        mask = rng.random(length) > 0.3
        mask[0] = False
        samples.append(
            Sample(
                token_ids=rng.integers(0, VOCAB, length),
                loss_mask=mask,
                rollout_logprobs=np.zeros(length, np.float32),
                policy_versions=np.zeros(length, np.int32),
                # largest gradient about 0.1, the scale that the absolute limits of test_layouts.py are set for
                advantage=float(rng.normal() * 0.6),
            )
        )
    return samples


def step_samples(family: str, tied: bool, n: int) -> list[Sample]:
    """The samples of step `n`. Of a model with experts those of later steps say which experts their tokens take, and of one
    model those of the first step too, so that its gradients are compared."""
    samples = make_samples(n)
    if family not in MOE or (n == 0 and (family, tied) != ("qwen3moe", True)):
        return samples
    return [with_routes(sample, family, 100 * n + i) for i, sample in enumerate(samples)]


def with_routes(sample: Sample, family: str, seed: int) -> Sample:
    """Drawn by lot, -1 for the last token, as servers leave it, and for all of one sample in five."""
    rng, length = np.random.default_rng(seed), len(sample.token_ids)
    count, top_k = MOE[family]["num_experts"], MOE[family]["num_experts_per_tok"]
    routes = rng.permuted(np.tile(np.arange(count), (length, MOE_LAYERS, 1)), axis=-1)[..., :top_k].astype(np.int16)
    routes[-1:] = -1
    return replace(sample, routes=np.full_like(routes, -1) if seed % 5 == 4 else routes)


def noise(seed: int, samples: list[Sample]) -> list[np.ndarray]:
    """What is added to log-probs to make old ones, so that ratios are off 1 and some are clipped."""
    rng = np.random.default_rng(seed + 1000)
    return [rng.normal(0, 0.3, len(s.token_ids)).astype(np.float32) for s in samples]


@dataclass
class Step:
    logprobs: list[np.ndarray]
    entropies: list[np.ndarray]
    loss: float
    grad_norm: float


class GivenRoutes:
    """In the place of a router's forward (TopKRouter of modeling_qwen3_moe.py and modeling_qwen2_moe.py): the experts of a
    sequence are given, their weights are the router's."""

    def __init__(self, gate: Any, layer: int) -> None:
        self.gate, self.layer = gate, layer
        self.routes: np.ndarray | None = None  # [T, layers, k]
        self.chosen = torch.zeros(0)  # [T, k] of the last sequence

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden.reshape(-1, self.gate.hidden_dim) @ self.gate.weight.T
        probabilities = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
        self.chosen = probabilities.topk(self.gate.top_k).indices
        for token, layers in enumerate(self.routes if self.routes is not None else ()):
            if layers[self.layer, 0] >= 0:
                self.chosen[token] = torch.from_numpy(layers[self.layer])
        weights = torch.stack([row[chosen] for row, chosen in zip(probabilities, self.chosen, strict=True)])
        if self.gate.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, self.chosen


class Reference:
    """HF model and AdamW (weight decay on matrices only) trained on the same samples by the formulas written out."""

    def __init__(self, model: Any, aux_coef: float = 0.0) -> None:
        self.model, self.aux_coef = model, aux_coef
        matrices = [p for p in model.parameters() if p.dim() > 1]  # experts too
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, **OPTIM)
        self.routers: list[GivenRoutes] = []
        for number, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
                self.routers.append(GivenRoutes(layer.mlp.gate, number))
                layer.mlp.gate.forward = self.routers[-1]

    def logits(self, sample: Sample) -> torch.Tensor:
        for router in self.routers:
            router.routes = sample.routes
        wanted = {"output_router_logits": True} if self.aux_coef else {}
        output = self.model(torch.from_numpy(sample.token_ids)[None], **wanted)
        self.router_logits = output.router_logits if self.aux_coef else ()
        return output.logits[0]

    def balance(self) -> torch.Tensor | float:
        """Of the last sequence, summed over layers."""
        total: Any = 0.0
        for logits, router in zip(self.router_logits, self.routers, strict=True):
            probabilities, count = logits.softmax(-1), logits.size(-1)
            chosen = torch.bincount(router.chosen.flatten(), minlength=count)
            total = total + count * (chosen / chosen.sum() * probabilities.mean(0)).sum()
        return total

    def score(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob and entropy of tokens 1.. under the temperature."""
        table = torch.log_softmax(self.logits(sample)[:-1].float() / TEMPERATURE, -1)
        chosen = table.gather(-1, torch.from_numpy(sample.token_ids)[1:, None]).squeeze(-1)
        return chosen, -(table.exp() * table).sum(-1)

    def backward(self, samples: list[Sample], offset: list[np.ndarray]) -> Step:
        """Token-mean clipped surrogate minus the entropy bonus; leaves gradients in the model."""
        self.optimizer.zero_grad()
        total = sum(int(s.loss_mask.sum()) for s in samples)
        tokens = sum(len(s.token_ids) for s in samples)
        step = Step([], [], 0.0, 0.0)
        for sample, shift in zip(samples, offset, strict=True):
            if len(sample.token_ids) < 2:
                if self.aux_coef:
                    self.logits(sample)
                    (self.aux_coef / tokens * self.balance()).backward()
                step.logprobs.append(np.zeros(1, np.float32))
                step.entropies.append(np.zeros(1, np.float32))
                continue
            logprob, entropy = self.score(sample)
            mask = torch.from_numpy(sample.loss_mask[1:])
            old = logprob.detach() + torch.from_numpy(shift[1:])
            ratio = (logprob - old).exp()
            surrogate = torch.maximum(-sample.advantage * ratio, -sample.advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
            loss = ((surrogate - ENTROPY_COEF * entropy) * mask).sum() / total
            if self.aux_coef:
                loss = loss + self.aux_coef * len(sample.token_ids) / tokens * self.balance()
            loss.backward()
            step.loss += float((surrogate * mask).sum() / total)
            zero = torch.zeros(1)
            step.logprobs.append(torch.cat([zero, (logprob.detach() * mask)]).numpy())
            step.entropies.append(torch.cat([zero, (entropy.detach() * mask)]).numpy())
        return step

    def update(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self.optimizer.step()
        return float(norm)


class HfRun:
    """The reference steps of one model: logits before them, gradients of the first, scores of each, weights after them."""

    def __init__(self, family: str, tied: bool) -> None:
        model = make_model(family, tied=tied)
        runner = Reference(model, AUX_COEF.get((family, tied), 0.0))
        self.steps: list[Step] = []
        with torch.no_grad():
            self.logits = [runner.logits(s) for s in step_samples(family, tied, 0)]
        self.routes: list[np.ndarray] = []  # [T, layers, k] what the routers took of themselves in the first step
        with torch.no_grad():
            for sample in make_samples(0) if runner.routers else []:
                runner.logits(sample)
                self.routes.append(torch.stack([router.chosen for router in runner.routers], 1).numpy())
        for n in range(STEPS):
            samples = step_samples(family, tied, n)
            step = runner.backward(samples, noise(n, samples))
            if n == 0:
                self.gradients = stored((k, p.grad.clone()) for k, p in model.named_parameters())
            step.grad_norm = runner.update()
            self.steps.append(step)
        self.weights = stored((k, p.detach().clone()) for k, p in model.named_parameters())
