"""What needs no second rank: rope variants against HF, bf16, the reference pass of the KL, packing that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_reference as ref
import numpy as np
import pytest
import torch
from layout_cases import Layout
from layout_worker import config_for

from torl_mega.errors import ConfigError
from torl_mega.trainer import parallel

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn with its factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.3,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    config = config_for(Layout(), Path("unused"))
    parallel.init_distributed(config.parallel, config.trainer)
    yield
    parallel.destroy()


def trainer_for(path: Path, *overrides: str) -> Any:
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    return MegatronTrainer(config_for(Layout(), path, overrides))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_rope_variants_are_those_of_hf(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    model = ref.make_model(family, tied=False, layers=2, rope_parameters={"rope_theta": 10000.0, **rope})
    ref.save_model(model, tmp_path)
    samples = ref.make_samples(0)
    scored = trainer_for(tmp_path).old_logprobs(samples)
    wanted = ref.Reference(model).backward(samples, ref.noise(0, samples)).logprobs
    assert max(float(np.abs(a.old_logprobs - b).max()) for a, b in zip(scored, wanted, strict=True)) <= 2e-6


def test_bf16_trains_with_fp32_masters(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=True, layers=2, dtype=torch.bfloat16), tmp_path)
    trainer = trainer_for(tmp_path, "model.dtype=bfloat16", "optim.lr=0.00001")
    exact = ref.Reference(ref.make_model("qwen2", tied=True, layers=2, dtype=torch.bfloat16).float())
    samples = ref.make_samples(0)
    scored = trainer.old_logprobs(samples)
    wanted = exact.backward(samples, [np.zeros(len(s.token_ids), np.float32) for s in samples])
    gaps = np.concatenate([np.abs(a.old_logprobs - b) for a, b in zip(scored, wanted.logprobs, strict=True)])
    assert gaps.mean() <= 0.02
    metrics = trainer.forward_backward(scored)
    norm = trainer.optim_step()["grad_norm"]
    assert metrics["loss"] == pytest.approx(wanted.loss, abs=1e-3)
    assert norm == pytest.approx(exact.update(), rel=0.02)
    assert {t.dtype for _, t in trainer.weights()} == {torch.bfloat16}


def test_optimizer_offload_trains_alike_or_is_refused(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=True, layers=2, dtype=torch.bfloat16), tmp_path)
    trained = []
    for offload in ("false", "true"):
        trainer = trainer_for(tmp_path, "model.dtype=bfloat16", f"trainer.optimizer_offload={offload}")
        for n in range(2):
            trainer.forward_backward(trainer.old_logprobs(ref.make_samples(n)))
            trainer.optim_step()
        trained.append({name: t.clone() for name, t in trainer.weights()})
    assert all(torch.equal(t, trained[1][name]) for name, t in trained[0].items())
    for refused in ("model.dtype=float32", "trainer.distributed_optimizer=false"):
        with pytest.raises(ConfigError, match=r"trainer\.optimizer_offload needs"):
            trainer_for(tmp_path, "model.dtype=bfloat16", "trainer.optimizer_offload=true", refused)


def test_reference_pass_keeps_the_start_and_the_policy(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=False, layers=2), tmp_path)
    trainer = trainer_for(tmp_path, "algo.kl_coef=0.1")
    samples = ref.make_samples(0)
    first = trainer.old_logprobs(samples)
    assert all(np.array_equal(t.old_logprobs, t.ref_logprobs) for t in first)
    trainer.forward_backward(first)
    trainer.optim_step()
    moved = {name: t.clone() for name, t in trainer.weights()}
    second = trainer.old_logprobs(samples)
    assert all(np.array_equal(a.old_logprobs, b.ref_logprobs) for a, b in zip(first, second, strict=True))
    assert any(not np.array_equal(t.old_logprobs, t.ref_logprobs) for t in second)
    assert all(torch.equal(t, moved[name]) for name, t in trainer.weights())
    assert trainer.forward_backward(second)["ref_kl"] > 0


def test_packing_changes_nothing_but_rounding(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=False, layers=2), tmp_path)
    samples = ref.make_samples(0)
    norms, logprobs = [], []
    for budget in (48, 100, 1000):
        trainer = trainer_for(tmp_path, f"trainer.micro_batch_tokens={budget}")
        scored = trainer.old_logprobs(samples)
        trainer.forward_backward(scored)
        norms.append(trainer.optim_step()["grad_norm"])
        logprobs.append(np.concatenate([t.old_logprobs for t in scored]))
    assert max(norms) - min(norms) <= 1e-6 * norms[0]
    assert max(float(np.abs(x - logprobs[0]).max()) for x in logprobs) <= 2e-6


def test_same_bits_twice(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=False, layers=2), tmp_path)

    def train() -> tuple[list[float], dict[str, torch.Tensor]]:
        trainer = trainer_for(tmp_path)
        found = []
        for n in range(2):
            found += trainer.forward_backward(trainer.old_logprobs(ref.make_samples(n))).values()
            found += trainer.optim_step().values()
        return found, {name: t.clone() for name, t in trainer.weights()}

    first, second = train(), train()
    assert first[0] == second[0]
    assert all(torch.equal(t, second[1][name]) for name, t in first[1].items())
