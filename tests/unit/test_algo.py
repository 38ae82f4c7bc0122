"""Advantages, loss weights, loss and correction against slow references written from the papers."""

import math

import numpy as np
import pytest
import torch

from torl_mega.algo.advantage import group_advantages
from torl_mega.algo.correction import correction_weights, mismatch
from torl_mega.algo.loss import loss_weights, policy_loss
from torl_mega.config_file import load_config
from torl_mega.types import Sample, TrainSample


def algo(**over):
    return load_config("conf/base.yaml", [f"algo.{k}={v}" for k, v in over.items()]).algo


def train_sample(rng, num_tokens, *, trained=None, advantage=1.0):
    mask = np.zeros(num_tokens, bool)
    mask[num_tokens // 3 :] = True
    if trained is False:
        mask[:] = False
    rollout = np.where(mask, -rng.random(num_tokens), 0).astype(np.float32)
    old = np.where(mask, rollout + rng.normal(0, 0.4, num_tokens), 0).astype(np.float32)
    sample = Sample(rng.integers(0, 9, num_tokens), mask, rollout, np.where(mask, 0, -1).astype(np.int32), advantage)
    return TrainSample(sample, old, np.where(mask, 0.5, 0).astype(np.float32))


def test_grpo_advantages_by_hand():
    got = group_advantages(np.array([1.0, -1.0, -1.0, -1.0]), "grpo")
    std = math.sqrt((1.5**2 + 3 * 0.5**2) / 3)
    np.testing.assert_allclose(got, np.array([1.5, -0.5, -0.5, -0.5]) / (std + 1e-6), rtol=1e-12)


def test_dr_grpo_has_no_std_and_groups_without_signal_are_zero():
    np.testing.assert_allclose(group_advantages(np.array([1.0, -1.0]), "dr_grpo"), [1.0, -1.0])
    assert not group_advantages(np.ones(8), "grpo").any()
    assert not group_advantages(np.array([1.0]), "grpo").any()


@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_loss_weights_against_the_formula(loss_agg):
    rng = np.random.default_rng(0)
    batch = [train_sample(rng, 6), train_sample(rng, 12), train_sample(rng, 9, trained=False)]
    weights = loss_weights(batch, algo(loss_agg=loss_agg), max_response_tokens=20)
    n = [4, 8]
    expected = {
        "token_mean": [1 / 12, 1 / 12],
        "seq_mean_token_mean": [1 / (2 * n[0]), 1 / (2 * n[1])],
        "seq_mean_token_sum_norm": [1 / 40, 1 / 40],
    }[loss_agg]
    for item, weight, value in zip(batch[:2], weights[:2], expected, strict=True):
        np.testing.assert_allclose(weight, np.where(item.sample.loss_mask, value, 0), rtol=1e-6)
    assert not weights[2].any()


def slow_loss(logprobs, item, weights, config):
    total = 0.0
    for t, weight in enumerate(weights):
        if weight == 0:
            continue
        ratio = math.exp(logprobs[t] - item.old_logprobs[t])
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        advantage = item.sample.advantage
        total += weight * -min(ratio * advantage, clipped * advantage)
    return total


def tensors(batch, weights, logprobs):
    cat = lambda arrays: torch.from_numpy(np.concatenate(arrays))  # noqa: E731
    return {
        "logprobs_T": logprobs,
        "entropy_T": torch.zeros_like(logprobs),
        "old_logprobs_T": cat([b.old_logprobs for b in batch]),
        "ref_logprobs_T": None,
        "advantages_T": cat([np.full(b.old_logprobs.size, b.sample.advantage, np.float32) for b in batch]),
        "weights_T": cat(weights),
    }


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_loss_equals_the_slow_loop_and_micro_batches_sum_to_the_batch(advantage):
    rng = np.random.default_rng(1)
    config = algo(clip_low=0.1, clip_high=0.3)
    batch = [train_sample(rng, n, advantage=advantage) for n in (5, 11, 8)]
    weights = loss_weights(batch, config, max_response_tokens=20)
    logprobs = [
        torch.tensor(b.old_logprobs + rng.normal(0, 0.3, b.old_logprobs.size).astype(np.float32)) for b in batch
    ]
    whole, metrics = policy_loss(**tensors(batch, weights, torch.cat(logprobs)), config=config)
    expected = sum(slow_loss(lp.numpy(), b, w, config) for lp, b, w in zip(logprobs, batch, weights, strict=True))
    assert whole.item() == pytest.approx(expected, rel=1e-5)
    parts = [
        policy_loss(**tensors([b], [w], lp), config=config) for b, w, lp in zip(batch, weights, logprobs, strict=True)
    ]
    assert sum(p[0].item() for p in parts) == pytest.approx(whole.item(), rel=1e-5)
    assert sum(p[1]["clip_frac"].item() for p in parts) == pytest.approx(metrics["clip_frac"].item(), rel=1e-5)


def test_masked_tokens_reach_neither_loss_nor_gradient():
    rng = np.random.default_rng(2)
    config = algo()
    item = train_sample(rng, 9)
    weights = loss_weights([item], config, max_response_tokens=20)
    logprobs = torch.tensor(item.old_logprobs)
    logprobs[: 9 // 3] = 200.0  # would overflow exp()
    logprobs.requires_grad_()
    loss, _ = policy_loss(**tensors([item], weights, logprobs), config=config)
    loss.backward()
    assert torch.isfinite(loss)
    assert not logprobs.grad[: 9 // 3].any()
    assert logprobs.grad[9 // 3 :].all()


def test_kl_and_entropy_terms():
    rng = np.random.default_rng(3)
    item = train_sample(rng, 6, advantage=0.0)
    config = algo(kl_coef=0.5, entropy_coef=0.25)
    weights = loss_weights([item], config, max_response_tokens=20)
    inputs = tensors([item], weights, torch.tensor(item.old_logprobs))
    gap = torch.full_like(inputs["logprobs_T"], 0.2)
    inputs |= {"ref_logprobs_T": inputs["logprobs_T"] + gap, "entropy_T": torch.full_like(gap, 2.0)}
    loss, metrics = policy_loss(**inputs, config=config)
    k3 = math.exp(0.2) - 0.2 - 1
    assert loss.item() == pytest.approx(0.5 * k3 - 0.25 * 2.0, rel=1e-5)
    assert metrics["ref_kl"].item() == pytest.approx(k3, rel=1e-5)


def test_corrections_by_hand():
    mask = np.array([False, True, True, True])
    gaps = np.log(np.array([1.0, 0.25, 1.0, 4.0], np.float32))
    sample = Sample(np.arange(4), mask, np.zeros(4, np.float32), np.zeros(4, np.int32), 1.0)
    item = TrainSample(sample, gaps, np.zeros(4, np.float32))
    bounds = {"correction_low": 0.5, "correction_high": 2.0}
    np.testing.assert_allclose(correction_weights(item, algo(correction="tis", **bounds)), [1, 0.25, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(correction_weights(item, algo(correction="mis", **bounds)), [1, 0, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(correction_weights(item, algo(correction="geo", **bounds)), [1, 1, 1, 1])
    narrow = {"correction_low": 1.01, "correction_high": 2.0}
    np.testing.assert_allclose(correction_weights(item, algo(correction="geo", **narrow)), [0, 0, 0, 0])


def test_mismatch_counts_sampled_tokens_only():
    rng = np.random.default_rng(4)
    item = train_sample(rng, 9)
    old = item.old_logprobs.copy()
    old[0] = 50.0  # a prompt token: must not count
    got = mismatch([TrainSample(item.sample, old, item.entropy)])
    gaps = (item.old_logprobs - item.sample.rollout_logprobs)[item.sample.loss_mask]
    assert got["max_abs_logprob_diff"] == pytest.approx(np.abs(gaps).max(), rel=1e-5)
    assert got["k3"] == pytest.approx((np.exp(gaps) - gaps - 1).mean(), rel=1e-4)
