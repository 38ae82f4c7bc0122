"""What needs no second rank: rope variants against HF, bf16, the reference of the KL, schedules, packing that changes nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_reference as ref
import numpy as np
import pytest
import torch
from layout_cases import Layout
from layout_worker import config_for

from torl_mega.algo.correction import mismatch
from torl_mega.config import GuardsConfig
from torl_mega.errors import ConfigError, GuardError
from torl_mega.run.limits import check_guards
from torl_mega.types import Sample

pytestmark = pytest.mark.usefixtures("process_group")

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


class Stream:
    """Stands for a CUDA stream and its events: everything is done when it was called."""

    def record_event(self) -> Stream:
        return self

    def wait_stream(self, other: object) -> None: ...

    def wait(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


def all_offloaded(hybrid: Any, fraction: float) -> Any:
    """As HybridDeviceOptimizer shares out parameters that lie on a GPU, at a fraction of 1."""
    copies = {p: p.detach().clone().float() for group in hybrid.param_groups for p in group["params"]}
    on_cpu = [{**group, "params": [copies[p] for p in group["params"]]} for group in hybrid.param_groups]
    hybrid.pin_cpu_grads = False
    rounded = {p: c for p, c in copies.items() if p.dtype != c.dtype}
    return on_cpu, [], copies, {c: p for p, c in copies.items()}, rounded


def test_an_offloaded_optimizer_is_saved_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's HybridDeviceOptimizer itself, which takes CPU tensors for those of a GPU: before the first step and after."""
    from megatron.core.optimizer import optimizer_config
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    from torl_mega.trainer import optimizer

    ref.save_model(ref.make_model("qwen2", tied=True, layers=2, dtype=torch.bfloat16), tmp_path)

    def trained(trainer: Any, *steps: int) -> dict[str, torch.Tensor]:
        for n in steps:
            trainer.forward_backward(trainer.old_logprobs(ref.make_samples(n)))
            trainer.optim_step()
        return {name: t.clone() for name, t in trainer.weights()}

    plain = trained(trainer_for(tmp_path, "model.dtype=bfloat16"), 0, 1, 2)
    on_gpu = SimpleNamespace(**vars(torch) | {"cuda": SimpleNamespace(is_available=lambda: True)})
    monkeypatch.setattr(optimizer, "torch", on_gpu)
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", all_offloaded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    overrides = ("model.dtype=bfloat16", "trainer.optimizer_offload=true")
    first = trainer_for(tmp_path, *overrides)
    assert isinstance(first.optimizer.chained_optimizers[0].optimizer, HybridDeviceOptimizer)
    first.save(tmp_path / "step_0", extra={})
    trained(first, 0, 1)
    first.save(tmp_path / "step_2", extra={})
    wanted = trained(first, 2)
    for name, rest in (("step_0", (0, 1, 2)), ("step_2", (2,))):
        again = trainer_for(tmp_path, *overrides)
        again.load(tmp_path / name)
        found = trained(again, *rest)
        assert all(torch.equal(t, found[n]) for n, t in wanted.items())
    assert all(torch.equal(t, wanted[n]) for n, t in plain.items())


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


@pytest.mark.parametrize("recipe", ["linear", "cosine", "constant"])
def test_more_steps_than_planned_continue_the_schedule(tmp_path: Path, recipe: str) -> None:
    ref.save_model(ref.make_model("qwen2", tied=True, layers=2), tmp_path)

    def learning_rates(num_steps: int, resume: Path | None = None) -> list[float]:
        trainer = trainer_for(tmp_path, f"num_steps={num_steps}", f"optim.schedule={recipe}", "optim.warmup_steps=1")
        done = int(trainer.load(resume)["steps_done"]) if resume else 0
        found = []
        for _ in range(num_steps - done):
            trainer.forward_backward(trainer.old_logprobs(samples))
            found.append(trainer.optim_step()["lr"])
        if num_steps == 2:
            trainer.save(tmp_path / "step_2", extra={"steps_done": 2})
        return found

    samples = ref.make_samples(0)[:2]
    fresh = learning_rates(6)
    short = learning_rates(2)
    assert short[0] == fresh[0] == pytest.approx(ref.OPTIM["lr"] / 2)  # warm-up starts above 0
    assert learning_rates(6, resume=tmp_path / "step_2") == fresh[2:]
    assert min(fresh) > 0


def test_the_probe_compares_at_temperature_one_whatever_the_rollouts_have(tmp_path: Path) -> None:
    model = ref.make_model("qwen2", tied=True, layers=2)
    ref.save_model(model, tmp_path)
    trainer = trainer_for(tmp_path, "rollout.temperature=1.6")
    sample = ref.make_samples(0)[0]
    every = Sample(sample.token_ids, np.arange(len(sample.token_ids)) > 0, *[np.zeros(len(sample.token_ids))] * 2, 0.0)
    ids = torch.from_numpy(sample.token_ids)
    table = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
    wanted = table.gather(-1, ids[1:, None])[:, 0].detach().numpy()
    assert np.abs(trainer.score(every, temperature=1.0)[1:] - wanted).max() <= 2e-6
    (scored,) = trainer.old_logprobs([every])
    assert np.abs(scored.old_logprobs[1:] - wanted).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moved_reference_comes_back_from_a_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    ref.save_model(ref.make_model("qwen2", tied=True, layers=2, dtype=dtype), tmp_path)
    moving = ("algo.kl_coef=0.1", "algo.ref_every_steps=1", "num_steps=3", f"model.dtype={str(dtype)[6:]}")

    def step(trainer: Any, n: int) -> Any:
        scored = trainer.old_logprobs(ref.make_samples(n))
        trainer.forward_backward(scored)
        trainer.optim_step()
        return scored

    calm = trainer_for(tmp_path, *moving)
    step(calm, 0)
    second = step(calm, 1)  # the reference is the policy after step 0, which is the policy of this step
    assert all(np.array_equal(t.old_logprobs, t.ref_logprobs) for t in second)
    calm.save(tmp_path / "step_2", extra={})
    rough = trainer_for(tmp_path, *moving)
    rough.load(tmp_path / "step_2")
    assert all(torch.equal(a, b) for a, b in zip(rough._reference.weights, calm._reference.weights, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(rough._reference.weights, rough._parameters(), strict=True))
    for a, b in zip(step(calm, 2), step(rough, 2), strict=True):
        assert np.array_equal(a.ref_logprobs, b.ref_logprobs)
        assert np.array_equal(a.old_logprobs, b.old_logprobs)
    weights = dict(calm.weights())
    assert all(torch.equal(t, weights[name]) for name, t in rough.weights())


def test_the_pass_left_out_changes_nothing_and_still_measures_the_mismatch(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=True, layers=2), tmp_path)
    found = []
    for when in ("always", "when_needed"):
        trainer = trainer_for(tmp_path, f"algo.old_logprobs={when}")
        scored = trainer.old_logprobs(ref.make_samples(0))
        assert (scored[0].old_logprobs is None) == (when == "when_needed")
        metrics = {**mismatch(scored), **trainer.forward_backward(scored)}
        trainer.optim_step()
        found.append((metrics, {name: t.clone() for name, t in trainer.weights()}))
    (with_pass, weights), (without, others) = found
    assert all(torch.equal(t, others[name]) for name, t in weights.items())
    for name, value in without.items():
        assert value == pytest.approx(with_pass[name], rel=1e-5, abs=1e-7), name
    assert without["max_abs_logprob_diff"] > 0
    for needed in ("algo.correction=tis", "trainer.mini_batch_samples=128", "rollout.max_staleness=1"):
        assert config_for(Layout(), tmp_path, ("algo.old_logprobs=when_needed", needed)).needs_old_logprobs


def test_a_head_in_fp32_is_nearer_to_the_exact_log_probs(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=False, layers=2, dtype=torch.bfloat16), tmp_path)
    samples, gaps, gradients = ref.make_samples(0), [], []
    exact = ref.Reference(ref.make_model("qwen2", tied=False, layers=2, dtype=torch.bfloat16).float())
    wanted = exact.backward(samples, [np.zeros(len(s.token_ids), np.float32) for s in samples])
    for fp32 in ("false", "true"):
        trainer = trainer_for(tmp_path, "model.dtype=bfloat16", f"model.fp32_head={fp32}")
        scored = trainer.old_logprobs(samples)
        pairs = zip(scored, wanted.logprobs, strict=True)
        gaps.append(np.concatenate([np.abs(a.old_logprobs - b) for a, b in pairs]).mean())
        trainer.forward_backward(scored)
        gradients.append(trainer.optim_step()["grad_norm"])
    assert gaps[1] < gaps[0]
    assert gradients[1] == pytest.approx(exact.update(), rel=0.02)


@pytest.mark.parametrize("lie", ["none", "noise", "temperature", "stale weights"])
def test_a_generator_that_lies_is_noticed_within_two_steps(
    tmp_path: Path, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ref.make_model("qwen2", tied=True, layers=2, initializer_range=0.2)
    ref.save_model(model, tmp_path)
    trainer, rng = trainer_for(tmp_path, "optim.lr=0.01"), np.random.default_rng(0)
    reported: list[np.ndarray] = []
    for step in range(2):
        samples = ref.make_samples(step)
        if step == 0 or lie != "stale weights":  # those servers hold the first weights for ever
            reported = [t.old_logprobs for t in trainer.old_logprobs(samples)]
        else:
            reported = [t.old_logprobs for t in trainer_for(tmp_path).old_logprobs(samples)]
        if lie == "noise":
            reported = [r + rng.normal(0, 0.2, r.shape).astype(np.float32) for r in reported]
        if lie == "temperature":
            reported = [trainer.score(s, temperature=1.3 * ref.TEMPERATURE) for s in samples]
        told = [replace(s, rollout_logprobs=r) for s, r in zip(samples, reported, strict=True)]
        scored = trainer.old_logprobs(told)
        check_guards(step, mismatch(scored), GuardsConfig())
        trainer.forward_backward(scored)
        trainer.optim_step()
    assert ("k3" in caplog.text) == (lie != "none"), mismatch(scored)
    if lie != "none":
        with pytest.raises(GuardError, match="max_logprob_diff"):
            check_guards(1, mismatch(scored), GuardsConfig(max_logprob_diff=0.05))
