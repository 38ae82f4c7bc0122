"""Advantages, loss weights, losses and corrections against slow loops written from the papers, on random ragged inputs."""

import dataclasses
import math

import numpy as np
import pytest
import slow_algo
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torl_mega.algo.advantage import bounded_penalty, charge_kl, step_advantages
from torl_mega.algo.advice import advice
from torl_mega.algo.correction import correction_weights, mismatch
from torl_mega.algo.loss import Sequences, policy_loss
from torl_mega.algo.weights import loss_weights, token_shares
from torl_mega.config_file import load_config
from torl_mega.types import Sample, TrainSample

ADVANTAGES = ["grpo", "dr_grpo", "rloo", "batch_std", "reinforce_pp"]
LOSSES = ["ppo", "gspo", "cispo"]
AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "prompt_mean"]
CORRECTIONS = ["none", "tis", "seq_tis", "mis", "geo", "geo_tis"]
LONGEST = 20  # rollout.max_response_tokens
MANY = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def algo(**over):
    return load_config("conf/base.yaml", [f"algo.{k}={'null' if v is None else v}" for k, v in over.items()]).algo


def train_sample(rng, num_tokens, *, trained=None, advantage=1.0, group=0, spread=0.4):
    mask = np.zeros(num_tokens, bool)
    mask[num_tokens // 3 :] = True
    if trained is False:
        mask[:] = False
    rollout = np.where(mask, -rng.random(num_tokens), 0).astype(np.float32)
    old = np.where(mask, rollout + rng.normal(0, spread, num_tokens), 0).astype(np.float32)
    sample = Sample(
        rng.integers(0, 9, num_tokens), mask, rollout, np.where(mask, 0, -1).astype(np.int32), advantage, group
    )
    ref = np.where(mask, old + rng.normal(0, 0.5, num_tokens), 0).astype(np.float32)
    return TrainSample(sample, old, np.where(mask, 0.5, 0).astype(np.float32), ref)


def ragged(rng, *, spread=0.4):
    """A mini-batch: three to nine sequences of one to sixteen tokens in up to three groups, some wholly masked, holes in
    masks."""
    batch = []
    for _ in range(int(rng.integers(3, 10))):
        item = train_sample(rng, int(rng.integers(1, 17)), group=int(rng.integers(0, 3)), spread=spread)
        holes = item.sample.loss_mask & (rng.random(item.sample.loss_mask.size) > 0.25) & (rng.random() > 0.2)
        batch.append(
            dataclasses.replace(
                item, sample=dataclasses.replace(item.sample, loss_mask=holes, advantage=float(rng.normal()))
            )
        )
    return batch


def inputs(batch, config, logprobs):
    """The arguments of `policy_loss` for whole sequences."""
    cat = lambda arrays: torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *arrays]))  # noqa: E731
    lengths = [b.old_logprobs.size for b in batch]
    return {
        "logprobs_T": logprobs,
        "entropy_T": torch.zeros_like(logprobs),
        "old_logprobs_T": cat([b.old_logprobs for b in batch]),
        "ref_logprobs_T": cat([b.ref_logprobs for b in batch]),
        "advantages_T": cat([np.full(n, b.sample.advantage, np.float32) for n, b in zip(lengths, batch, strict=True)]),
        "weights_T": cat(loss_weights(batch, config, max_response_tokens=LONGEST)),
        "shares_T": cat(token_shares(batch)),
        "sequences": Sequences(
            torch.from_numpy(np.repeat(np.arange(len(batch)), lengths)),
            torch.tensor([int(b.sample.loss_mask.sum()) for b in batch]),
        ),
        "config": config,
    }


def current(rng, batch, spread=0.3):
    """Log-probs after some updates."""
    moved = [b.old_logprobs + rng.normal(0, spread, b.old_logprobs.size).astype(np.float32) for b in batch]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *moved]))


# ------------------------------------------------------------------------------------------------ advantages


REWARDS = st.lists(
    st.lists(st.sampled_from([-1.0, -0.5, 0.25, 1.0]), min_size=1, max_size=6).map(np.array), min_size=1, max_size=5
)


@pytest.mark.parametrize("kind", ADVANTAGES)
@MANY
@given(groups=REWARDS)
def test_advantages_equal_the_slow_loop(kind, groups):
    for got, wanted in zip(step_advantages(groups, kind), slow_algo.advantages(groups, kind), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ADVANTAGES)
@MANY
@given(groups=REWARDS, shift=st.floats(-5, 5))
def test_a_shift_of_all_rewards_changes_no_advantage(kind, groups, shift):
    moved = step_advantages([g + shift for g in groups], kind)
    for a, b in zip(step_advantages(groups, kind), moved, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_groups_without_signal_and_of_one_are_zero():
    for kind in set(ADVANTAGES) - {"reinforce_pp"}:
        groups = [np.ones(8), np.full(7, 0.7), np.array([1.0]), np.array([1.0, -1.0])]
        all_right, alike, alone, mixed = step_advantages(groups, kind)
        assert not all_right.any()
        assert not alike.any(), "0.7 seven times has another mean than 0.7"
        assert not alone.any()
        assert mixed.all()


def test_a_penalty_on_the_advantage_is_bounded_and_flips_no_sign():
    assert bounded_penalty(0.0, -0.05, 0.5) == 0.0  # an all-correct group stays without signal
    assert bounded_penalty(1.0, -0.05, 0.5) == pytest.approx(0.95)
    assert bounded_penalty(1.0, -9.0, 0.5) == pytest.approx(0.5)
    assert bounded_penalty(-1.0, -9.0, 0.5) == pytest.approx(-1.5)


@MANY
@given(seed=SEEDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_equals_the_slow_loop(estimator, seed):
    rng = np.random.default_rng(seed)
    config = algo(kl_coef=0.3, kl_in="reward", kl_estimator=estimator, advantage="grpo")
    batch = ragged(rng)
    rewards = rng.choice([-1.0, 1.0], len(batch))
    groups = sorted({b.sample.group for b in batch})
    order = {g: [i for i, b in enumerate(batch) if b.sample.group == g] for g in groups}
    plain = step_advantages([rewards[order[g]] for g in groups], "grpo")
    for g, values in zip(groups, plain, strict=True):
        for i, value in zip(order[g], values, strict=True):
            sample = dataclasses.replace(batch[i].sample, reward=float(rewards[i]), advantage=float(value) - 0.01)
            batch[i] = dataclasses.replace(batch[i], sample=sample)
    kls = {}  # of the samples that have trained tokens; the others are charged their group's mean, or the step's
    for i, b in enumerate(batch):
        for t in np.flatnonzero(b.sample.loss_mask):
            gap = float(b.ref_logprobs[t] - b.old_logprobs[t])
            kls[i] = kls.get(i, 0.0) + slow_algo.kl(gap, estimator)
    charged = list(rewards)
    for i, b in enumerate(batch):
        known = [kls[j] for j in order[b.sample.group] if j in kls] or list(kls.values()) or [0.0]
        charged[i] -= 0.3 * kls.get(i, sum(known) / len(known))
    wanted = slow_algo.advantages([[charged[i] for i in order[g]] for g in groups], "grpo")
    got = [item.sample.advantage for item in charge_kl(batch, config)]
    for g, values in zip(groups, wanted, strict=True):
        np.testing.assert_allclose([got[i] for i in order[g]], np.array(values) - 0.01, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_masking_an_answer_of_a_solved_group_gives_the_others_no_advantage(kind):
    """Sixteen right answers, all of the same KL, one of them masked: nobody is better than anybody."""
    rng = np.random.default_rng(3)
    one = train_sample(rng, 9, advantage=0.0)
    one = dataclasses.replace(one, sample=dataclasses.replace(one.sample, reward=1.0))
    masked = dataclasses.replace(one.sample, loss_mask=np.zeros(9, bool))
    batch = [one] * 15 + [dataclasses.replace(one, sample=masked)]
    config = algo(kl_coef=0.1, kl_in="reward", advantage=kind)
    assert [b.sample.advantage for b in charge_kl(batch, config)] == pytest.approx([0.0] * 16, abs=1e-9)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@MANY
@given(seed=SEEDS)
def test_loss_weights_equal_the_formula(loss_agg, seed):
    batch = ragged(np.random.default_rng(seed))
    weights = loss_weights(batch, algo(loss_agg=loss_agg), max_response_tokens=LONGEST)
    lengths = [int(b.sample.loss_mask.sum()) for b in batch]
    wanted = slow_algo.aggregation(lengths, [b.sample.group for b in batch], loss_agg, LONGEST)
    for item, weight, value in zip(batch, weights, wanted, strict=True):
        np.testing.assert_allclose(weight, np.where(item.sample.loss_mask, value, 0), rtol=1e-5)


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize("veto", [None, 0.4])
@MANY
@given(seed=SEEDS)
def test_corrections_equal_the_slow_loop(kind, veto, seed):
    bounds = {"correction_low": 0.7, "correction_high": 1.5, "correction_geo": "[0.9,1.2]", "correction_veto": veto}
    config = algo(correction=kind, **bounds)
    for item in ragged(np.random.default_rng(seed)):
        mask = item.sample.loss_mask
        gaps = (item.old_logprobs - item.sample.rollout_logprobs)[mask].astype(float).tolist()
        got = correction_weights(item, config)[mask]
        np.testing.assert_allclose(got, slow_algo.correction(gaps, config), rtol=1e-5)


def test_corrections_by_hand():
    mask = np.array([False, True, True, True])
    gaps = np.log(np.array([1.0, 0.25, 1.0, 4.0], np.float32))
    sample = Sample(np.arange(4), mask, np.zeros(4, np.float32), np.zeros(4, np.int32), 1.0)
    item = TrainSample(sample, gaps, np.zeros(4, np.float32))
    bounds = {"correction_low": 0.5, "correction_high": 2.0}  # of tokens; geo has its own
    np.testing.assert_allclose(correction_weights(item, algo(correction="tis", **bounds)), [1, 0.25, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(correction_weights(item, algo(correction="mis", **bounds)), [1, 0, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(correction_weights(item, algo(correction="geo", **bounds)), [1, 1, 1, 1])
    narrow = {"correction_geo": "[1.01,2.0]"}
    np.testing.assert_allclose(correction_weights(item, algo(correction="geo", **narrow)), [0, 0, 0, 0])


def test_mismatch_counts_trained_tokens_only():
    rng = np.random.default_rng(4)
    item = train_sample(rng, 9)
    old = item.old_logprobs.copy()
    old[0] = 50.0  # a prompt token: must not count
    got = mismatch([TrainSample(item.sample, old, item.entropy)])
    gaps = (item.old_logprobs - item.sample.rollout_logprobs)[item.sample.loss_mask]
    assert got["max_abs_logprob_diff"] == pytest.approx(np.abs(gaps).max(), rel=1e-5)
    assert got["k3"] == pytest.approx((np.exp(gaps) - gaps - 1).mean(), rel=1e-4)
    ordered = sorted(np.abs(gaps))
    assert got["abs_logprob_diff_p50"] == pytest.approx((ordered[2] + ordered[3]) / 2, rel=1e-4)
    assert got["abs_logprob_diff_p90"] <= got["abs_logprob_diff_p99"] <= got["max_abs_logprob_diff"]


# ------------------------------------------------------------------------------------------------ losses


def slow_loss(logprobs, batch, weights, config):
    """Sum of the terms, token by token, and d loss / d logprob written out by hand."""
    total, gradient, at = 0.0, np.zeros(len(logprobs)), 0
    low, high, c = 1 - config.clip_low, 1 + config.clip_high, config.dual_clip
    for item, weight in zip(batch, weights, strict=True):
        n, a = item.old_logprobs.size, item.sample.advantage
        where = np.flatnonzero(item.sample.loss_mask)
        gaps = {t: float(logprobs[at + t] - item.old_logprobs[t]) for t in where}
        for t in where:
            gap = sum(gaps.values()) / len(gaps) if config.loss == "gspo" else gaps[t]
            ratio = math.exp(min(max(gap, -20), 20))
            clipped = min(max(ratio, low), high)
            if config.loss == "cispo":
                term, slope = -a * clipped * float(logprobs[at + t]), -a * clipped
            else:
                term = max(-a * ratio, -a * clipped)
                slope = -a * ratio if -a * ratio >= -a * clipped and abs(gap) <= 20 else 0.0
                if c is not None and a < 0 and term > -a * c:
                    term, slope = -a * c, 0.0
            gap = float(item.ref_logprobs[t] - logprobs[at + t])
            if config.kl_coef:
                kl, kl_slope = {
                    "k1": (-gap, 1.0),
                    "k2": (gap * gap / 2, -gap),
                    "k3": (math.exp(gap) - gap - 1, 1 - math.exp(gap)),
                }[config.kl_estimator]
                if config.kl_estimator == "k3" and kl > 10:  # reached at a gap of 2.6, and flat from there
                    kl, kl_slope = 10.0, 0.0
                term, slope = term + config.kl_coef * kl, slope + config.kl_coef * kl_slope
            total += weight[t] * term
            gradient[at + t] = weight[t] * slope
        at += n
    return total, gradient


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@MANY
@given(
    seed=SEEDS,
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    correction=st.sampled_from(CORRECTIONS),
    kl=st.sampled_from([None, "k1", "k2", "k3"]),
)
def test_losses_and_gradients_equal_the_slow_loop(loss, loss_agg, seed, dual_clip, correction, kl):
    rng = np.random.default_rng(seed)
    config = algo(
        loss=loss, loss_agg=loss_agg, dual_clip=dual_clip, correction=correction, clip_low=0.1, clip_high=0.3,
        kl_coef=0.2 if kl else 0.0, kl_estimator=kl or "k3",
    )  # fmt: skip
    batch = ragged(rng)
    logprobs = current(rng, batch, spread=0.4).requires_grad_()
    value, _ = policy_loss(**inputs(batch, config, logprobs))
    weights = loss_weights(batch, config, max_response_tokens=LONGEST)
    wanted, gradient = slow_loss(logprobs.detach().numpy(), batch, weights, config)
    assert value.item() == pytest.approx(wanted, rel=2e-4, abs=2e-6)
    value.backward()
    np.testing.assert_allclose(logprobs.grad.numpy(), gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("loss", LOSSES)
@MANY
@given(seed=SEEDS)
def test_micro_batches_of_whole_sequences_sum_to_the_batch(loss, seed):
    rng = np.random.default_rng(seed)
    config = algo(loss=loss, loss_agg="prompt_mean", correction="tis", kl_coef=0.1)
    batch = ragged(rng)
    whole = inputs(batch, config, current(rng, batch))
    together, metrics = policy_loss(**whole)
    pieces, at = [], 0
    for item in batch:
        rows = slice(at, at + item.old_logprobs.size)
        cut = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
        ids = whole["sequences"].ids_T[rows]
        pieces.append(policy_loss(**{**cut, "sequences": Sequences(ids, whole["sequences"].lengths_N)}))
        at = rows.stop
    assert sum(p[0].item() for p in pieces) == pytest.approx(together.item(), rel=1e-4, abs=1e-6)
    for name in metrics:
        values = [p[1][name].item() for p in pieces]
        combined = max(values) if name.endswith("_max") else sum(values)
        assert combined == pytest.approx(metrics[name].item(), rel=1e-4, abs=1e-6), name


@MANY
@given(seed=SEEDS)
def test_context_ranks_that_share_sequences_sum_to_the_batch(seed):
    """GSPO's sequence ratio when each of two ranks holds every other token."""
    rng = np.random.default_rng(seed)
    config = algo(loss="gspo")
    batch = ragged(rng)
    whole = inputs(batch, config, current(rng, batch).requires_grad_())
    together, _ = policy_loss(**whole)
    together.backward()
    expected, whole["logprobs_T"].grad = whole["logprobs_T"].grad.clone(), None
    trained = whole["shares_T"] != 0
    gaps = torch.where(trained, (whole["logprobs_T"] - whole["old_logprobs_T"]).detach(), torch.zeros(1))
    ids, lengths = whole["sequences"].ids_T, whole["sequences"].lengths_N
    sums = torch.zeros(len(batch)).index_add(0, ids, gaps)
    total = 0.0
    for rank in (0, 1):
        rows = torch.arange(len(gaps)) % 2 == rank
        cut = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
        part, _ = policy_loss(**{**cut, "sequences": Sequences(ids[rows], lengths, lambda _: sums)})
        part.backward()
        total += part.item()
    assert total == pytest.approx(together.item(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(whole["logprobs_T"].grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@MANY
@given(
    seed=SEEDS,
    gap=st.floats(-200, 200),
    ref_gap=st.floats(-200, 200),
    advantage=st.sampled_from([-2.0, 0.0, 2.0]),
)
@example(seed=1, gap=0.0, ref_gap=12.0, advantage=0.0)
@example(seed=1, gap=12.0, ref_gap=-12.0, advantage=-2.0)
@example(seed=1, gap=-12.0, ref_gap=0.0, advantage=-2.0)
@example(seed=1, gap=150.0, ref_gap=150.0, advantage=2.0)
def test_no_token_makes_anything_infinite_and_its_influence_is_bounded(loss, seed, gap, ref_gap, advantage):
    """One token with a ratio of e^gap: everything stays finite; with a dual clip no token weighs more than its bound."""
    rng = np.random.default_rng(seed)
    config = algo(loss=loss, dual_clip=3.0, kl_coef=0.1, correction="geo_tis", correction_veto=1e-4)
    batch = [train_sample(rng, 9, advantage=advantage), train_sample(rng, 7, advantage=-1.0, group=1)]
    logprobs = current(rng, batch).requires_grad_()
    for item in batch:
        item.old_logprobs[-1] -= gap
        item.ref_logprobs[-1] += ref_gap
    arguments = inputs(batch, config, logprobs)
    value, metrics = policy_loss(**arguments)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(m.item()) for m in metrics.values())
    assert all(math.isfinite(m) for m in mismatch(batch).values())
    # 3 by the dual clip, 1.2 by the clip, and the KL's slope at its clamp
    most = arguments["weights_T"] * (arguments["advantages_T"].abs() * 3.0 + 0.1 * 20.0)
    assert (logprobs.grad.abs() <= most + 1e-6).all()


def test_without_dual_clip_an_exploding_ratio_is_finite():
    rng = np.random.default_rng(5)
    for advantage in (-1.0, 0.0, 1.0):
        batch = [train_sample(rng, 9, advantage=advantage)]
        logprobs = current(rng, batch).requires_grad_()
        batch[0].old_logprobs[-1] = -120.0
        value, _ = policy_loss(**inputs(batch, algo(), logprobs))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(logprobs.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_tokens_reach_neither_loss_nor_gradient(loss):
    rng = np.random.default_rng(2)
    config = algo(loss=loss, kl_coef=0.1)
    item = train_sample(rng, 9)
    logprobs = torch.tensor(item.old_logprobs)
    logprobs[: 9 // 3] = 200.0  # would overflow exp()
    logprobs.requires_grad_()
    value, _ = policy_loss(**inputs([item], config, logprobs))
    value.backward()
    assert torch.isfinite(value)
    assert not logprobs.grad[: 9 // 3].any()
    assert logprobs.grad[9 // 3 :].all()


def test_kl_and_entropy_terms():
    rng = np.random.default_rng(3)
    item = train_sample(rng, 6, advantage=0.0)
    arguments = inputs([item], algo(kl_coef=0.5, entropy_coef=0.25), torch.tensor(item.old_logprobs))
    gap = torch.full_like(arguments["logprobs_T"], 0.2)
    arguments |= {"ref_logprobs_T": arguments["logprobs_T"] + gap, "entropy_T": torch.full_like(gap, 2.0)}
    value, metrics = policy_loss(**arguments)
    k3 = math.exp(0.2) - 0.2 - 1
    assert value.item() == pytest.approx(0.5 * k3 - 0.25 * 2.0, rel=1e-5)
    assert metrics["ref_kl"].item() == pytest.approx(k3, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_logged_means_are_over_trained_tokens_whatever_the_weights(loss, loss_agg, correction):
    rng = np.random.default_rng(6)
    batch = [*ragged(rng), train_sample(rng, 12, spread=3.0)]
    config = algo(loss=loss, loss_agg=loss_agg, correction=correction, correction_low=0.8, correction_high=1.1)
    arguments = inputs(batch, config, current(rng, batch))
    entropy = torch.rand(arguments["logprobs_T"].shape)
    trained = torch.from_numpy(np.concatenate([b.sample.loss_mask for b in batch]))
    gap = (arguments["logprobs_T"] - arguments["old_logprobs_T"])[trained]
    _, metrics = policy_loss(**{**arguments, "entropy_T": entropy})
    assert metrics["entropy"].item() == pytest.approx(entropy[trained].mean().item(), rel=1e-5)
    assert metrics["approx_kl"].item() == pytest.approx((gap.exp() - gap - 1).mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ a generator that lies


def bandit(correction, *, steps=400, arms=6):
    """A policy over `arms` tokens trained on what a faulty server samples: one time in ten the last arm, which is wrong,
    whatever the policy says. Returns the log-probs of the best arm and of the faulty one along the way."""
    rng = np.random.default_rng(0)
    config = algo(correction=correction, loss_agg="token_mean", clip_high=10.0)
    logits = torch.zeros(arms, requires_grad=True)
    best, faulty = [], []
    for _ in range(steps):
        policy = torch.log_softmax(logits, 0).detach().numpy().astype(np.float64)
        served = 0.9 * np.exp(policy) / np.exp(policy).sum()
        served[-1] += 0.1
        tokens = rng.choice(arms, 64, p=served)
        rewards = np.where(tokens == 0, 1.0, -1.0)
        advantages = step_advantages([rewards], "dr_grpo")[0]
        one = np.ones(1, bool)
        batch = [
            TrainSample(
                Sample(np.array([t]), one, np.log(served[[t]]).astype(np.float32), np.zeros(1, np.int32), float(a)),
                policy[[t]].astype(np.float32),
                np.zeros(1, np.float32),
                np.zeros(1, np.float32),
            )
            for t, a in zip(tokens, advantages, strict=True)
        ]
        value, _ = policy_loss(**inputs(batch, config, torch.log_softmax(logits, 0)[torch.from_numpy(tokens)]))
        (gradient,) = torch.autograd.grad(value, logits)
        with torch.no_grad():
            logits -= 2.0 * gradient
        best.append(policy[0])
        faulty.append(policy[-1])
    return np.array(best), np.array(faulty), mismatch(batch)


def test_a_faulty_server_drives_the_policy_away_and_correction_holds_it():
    """Uncorrected, a token that the server invents is pushed down for ever, at the same pace however improbable it is;
    weighed by what the policy would have sampled it fades out. Both learn the best arm."""
    best, faulty, gap = bandit("none")
    assert best[-1] > math.log(0.9)
    assert faulty[-1] < -100.0
    assert faulty[199] - faulty[399] > 0.9 * (faulty[99] - faulty[299])  # no slower than before
    assert gap["k3"] > 0.1
    for correction in ("tis", "mis"):
        best, faulty, gap = bandit(correction)
        assert best[-1] > math.log(0.9)
        assert faulty[-1] > -12.0
    assert gap["k3"] > 0.1  # the server still lies, and is still seen to


# ------------------------------------------------------------------------------------------------ settings that are hardly meant


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"loss": "gspo", "loss_agg": "seq_mean_token_mean"}, ["clips nothing"]),
        ({"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}, ["not GSPO's objective"]),
        ({"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "loss_agg": "seq_mean_token_mean"}, []),
        ({"loss": "cispo"}, ["lifts weights below 0.8"]),
        ({"loss": "cispo", "clip_low": 1, "clip_high": 4, "dual_clip": 3}, ["dual_clip does nothing"]),
        ({"kl_coef": 1e-4, "kl_in": "reward"}, ["full advantage, however small"]),
        ({"kl_coef": 1e-4, "kl_in": "reward", "advantage": "dr_grpo"}, []),
        ({"kl_coef": 1e-4}, []),
        ({}, []),
    ],
)
def test_settings_that_work_and_are_hardly_meant_are_named(settings_, said):
    found = advice(algo(**settings_))
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))


def test_a_small_kl_is_a_full_advantage_in_a_solved_group_unless_its_std_is_left_out():
    """What `advice` says of KL in the reward."""
    rng = np.random.default_rng(3)
    batch = [train_sample(rng, 9, advantage=0.0) for _ in range(8)]
    batch = [dataclasses.replace(b, sample=dataclasses.replace(b.sample, reward=1.0)) for b in batch]
    largest = {
        kind: max(abs(b.sample.advantage) for b in charge_kl(batch, algo(kl_coef=1e-3, kl_in="reward", advantage=kind)))
        for kind in ("grpo", "dr_grpo", "rloo")
    }
    assert largest["grpo"] > 1
    assert max(largest["dr_grpo"], largest["rloo"]) < 0.05
