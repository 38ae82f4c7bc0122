"""Router replay on one rank: what a generator took is taken again, and routes or gradients that are wrong are seen.

Layouts, the update and its gradients are compared with HF in test_experts.py; a real server tells its routes in
tests/serving/test_moe_servers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_reference as ref
import numpy as np
import pytest
import torch
from layout_cases import Layout
from layout_worker import config_for, gather_gradients

from torl_mega.algo.correction import mismatch
from torl_mega.config import GuardsConfig
from torl_mega.errors import ConfigError, GuardError
from torl_mega.run.limits import check_guards
from torl_mega.trainer import router
from torl_mega.types import Sample

pytestmark = pytest.mark.usefixtures("process_group")

FAMILY = "qwen3moe"
GUARDS = GuardsConfig(max_logprob_diff=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    ref.save_model(ref.make_model(FAMILY, tied=False), folder)
    return folder


@pytest.fixture
def trainer(model: Path) -> Any:
    return trainer_for(model)


def trainer_for(path: Path, *overrides: str) -> Any:
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    return MegatronTrainer(config_for(Layout(), path, overrides))


def rolled_out(trainer: Any, change: Callable[[np.ndarray], None]) -> list[Sample]:
    """What a generator of the same weights samples whose routes differ by `change` from those that its router would take."""
    own = trainer_for(Path(trainer.config.model.path), "algo.router_replay=old").old_logprobs(ref.make_samples(0))
    samples = []
    for item in own:
        routes = item.sample.routes.copy()
        change(routes)
        routes[-1] = -1  # of the last token no server knows
        samples.append(replace(item.sample, routes=routes))
    scored = trainer.old_logprobs(samples)
    return [replace(s, rollout_logprobs=t.old_logprobs) for s, t in zip(samples, scored, strict=True)]


def flip(routes: np.ndarray) -> None:
    """One token in four goes to another expert than its first choice, in one layer."""
    for token in range(1, len(routes), 4):
        chosen = routes[token, 1]
        chosen[0] = next(e for e in range(8) if e not in chosen)


def as_it_is(routes: np.ndarray) -> None:
    del routes


def drift(trainer: Any, samples: list[Sample]) -> dict[str, float]:
    return mismatch(trainer.old_logprobs(samples))


def without_routes(samples: list[Sample]) -> list[Sample]:
    return [replace(s, routes=None) for s in samples]


def test_a_generators_flipped_routes_show_in_the_guard_without_replay_and_not_with_it(trainer: Any) -> None:
    samples = rolled_out(trainer, flip)
    replayed, own = drift(trainer, samples), drift(trainer, without_routes(samples))
    assert replayed["max_abs_logprob_diff"] <= 1e-5
    check_guards(0, replayed, GUARDS)
    with pytest.raises(GuardError, match="server and trainer compute different log-probs"):
        check_guards(0, own, GUARDS)


def test_routes_shifted_by_a_token_show_in_the_guard(trainer: Any) -> None:
    samples = rolled_out(trainer, as_it_is)
    check_guards(0, drift(trainer, samples), GUARDS)
    shifted = [replace(s, routes=np.roll(s.routes, 1, axis=0)) for s in samples]
    with pytest.raises(GuardError, match="server and trainer compute different log-probs"):
        check_guards(0, drift(trainer, shifted), GUARDS)


def test_how_many_choices_replay_changes_is_counted(trainer: Any) -> None:
    for change, share in ((as_it_is, 0.0), (flip, None)):
        samples = rolled_out(trainer, change)
        given = [s.routes[s.routes[:, 0, 0] >= 0] for s in samples]
        flipped = sum(len(range(1, len(routes), 4)) for routes in given)
        metrics = trainer.forward_backward(trainer.old_logprobs(samples))
        expected = flipped / sum(routes.size for routes in given) if share is None else share
        # a flip changes what later layers see, which may change their own choice too, so it is a lower bound
        assert expected <= metrics["experts/replay_changes"] <= 3 * expected
    plain = trainer.forward_backward(trainer.old_logprobs(without_routes(samples)))
    assert "experts/replay_changes" not in plain


def router_gradients(trainer: Any, samples: list[Sample]) -> dict[str, torch.Tensor]:
    trainer.forward_backward(trainer.old_logprobs(samples))
    return {name: g.clone() for name, g in gather_gradients(trainer) if name.endswith("mlp.gate.weight")}


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return -gradient


@pytest.mark.parametrize("fault", ["none", "wrong sign", "none reaches it"])
def test_a_router_gradient_of_the_wrong_sign_or_none_is_named(
    trainer: Any, model: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from transformers import AutoModelForCausalLM

    samples = rolled_out(trainer, flip)
    reference = ref.Reference(AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager"))
    reference.backward(samples, [np.zeros(len(s.token_ids), np.float32) for s in samples])
    wanted = {name: p.grad for name, p in reference.model.named_parameters() if name.endswith("mlp.gate.weight")}
    if fault != "none":
        plain = router.HfRouter.forward
        spoil = Negated.apply if fault == "wrong sign" else torch.Tensor.detach

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            weights, used = plain(self, *args, **kwargs)
            return spoil(weights), used

        monkeypatch.setattr(router.HfRouter, "forward", forward)
    found = router_gradients(trainer, samples)
    assert found.keys() == wanted.keys()
    off = [name for name in wanted if float((found[name] - wanted[name]).abs().max()) > 5e-7]
    assert off == ([] if fault == "none" else list(wanted))


def test_the_second_update_of_a_step_takes_the_experts_of_the_old_pass(model: Path) -> None:
    trainer = trainer_for(model, "algo.router_replay=old", "optim.lr=0.05")
    scored = trainer.old_logprobs(ref.make_samples(0))
    assert all(item.sample.routes is not None for item in scored)
    assert trainer.forward_backward(scored)["experts/replay_changes"] == 0
    trainer.optim_step()
    assert trainer.forward_backward(scored)["experts/replay_changes"] > 0  # the router has moved, the routes have not


def test_a_model_without_experts_has_no_routes(tmp_path: Path) -> None:
    ref.save_model(ref.make_model("qwen2", tied=True, layers=2), tmp_path)
    with pytest.raises(ConfigError, match=r"algo\.router_replay = old: a Qwen2ForCausalLM has no experts; take off"):
        trainer_for(tmp_path, "algo.router_replay=old")
