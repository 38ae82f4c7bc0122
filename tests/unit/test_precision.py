"""Precision profiles, spec choice and TransformerConfig, all without a GPU or Transformer Engine."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from torl_mega.errors import ConfigError
from torl_mega.trainer.precision import (
    PROFILES,
    Machine,
    check_precision,
    precision_settings,
    report,
    token_multiple,
    warn_if_unfit,
)

HOPPER = Machine((9, 0), (2, 8), (12, 9))
BLACKWELL = Machine((10, 0), (2, 8), (13, 0))


@pytest.mark.parametrize(
    ("profile", "machine", "complaint"),
    [
        ("default", Machine(None, None, None), None),
        ("fp8_hybrid_delayed", HOPPER, None),
        ("fp8_current", HOPPER, None),
        ("fp8_blockwise", HOPPER, None),
        ("mxfp8", BLACKWELL, None),
        ("fp8_blockwise", Machine(None, None, None), "needs a Hopper GPU, found none"),
        ("fp8_blockwise", BLACKWELL, "found compute capability 10.0"),
        ("mxfp8", HOPPER, "needs a Blackwell GPU, found compute capability 9.0"),
        ("fp8_current", Machine((9, 0), None, (12, 9)), "needs Transformer Engine >= 2.2, found none"),
        ("fp8_blockwise", Machine((9, 0), (2, 2), (12, 9)), "needs Transformer Engine >= 2.3, found 2.2"),
        ("fp8_blockwise", Machine((9, 0), (2, 8), (12, 4)), "needs CUDA >= 12.9, found 12.4"),
        ("fp8_hybrid_delayed", Machine((8, 0), (2, 8), (12, 9)), "found compute capability 8.0"),
    ],
)
def test_refusals_say_what_is_needed_and_found(profile: str, machine: Machine, complaint: str | None) -> None:
    if complaint is None:
        check_precision(profile, machine)
        return
    with pytest.raises(ConfigError) as caught:
        check_precision(profile, machine)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fp8_wants_bf16_weights() -> None:
    with pytest.raises(ConfigError, match=r"needs model\.dtype = bfloat16"):
        precision_settings("mxfp8", torch.float32)


def test_report_names_the_optimizer_in_use() -> None:
    found = report()
    assert "default" in found["usable_profiles"]
    if not torch.cuda.is_available():
        assert found["optimizer"] == "torl_mega.trainer.cpu.adam.FusedAdam"
        assert found["layer_spec"] == "local"


@pytest.mark.parametrize("profile", ["default", *PROFILES])
def test_transformer_config_for_transformer_engine(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to Megatron for the TE path; Megatron itself would refuse FP8 without TE, so it is caught on the way."""
    from torl_mega.config import ParallelConfig
    from torl_mega.config_file import load_config
    from torl_mega.trainer.cpu import backend as cpu_backend

    cpu_backend.install()
    from torl_mega.layout import describe_model
    from torl_mega.trainer import model

    handed: dict[str, Any] = {}
    monkeypatch.setattr(model, "TransformerConfig", lambda **settings: handed.update(settings))
    overrides = [f"trainer.precision={profile}", f"trainer.deterministic={str(profile == 'default').lower()}"]
    trainer = load_config("conf/torl_7b.yaml", overrides).trainer
    shape = describe_model(
        {
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        }
    )  # fmt: skip
    model.transformer_config(shape, ParallelConfig(tensor=2, sequence=True), trainer, torch.bfloat16, "te")
    assert handed["bf16"]
    assert handed["apply_rope_fusion"]
    assert handed["calculate_per_token_loss"]
    assert not handed["use_cpu_initialization"]
    assert handed["deterministic_mode"] == (profile == "default")
    if profile == "default":
        assert "fp8" not in handed
    else:
        assert (handed["fp8"], handed["fp8_recipe"]) == (PROFILES[profile].fp8, PROFILES[profile].recipe)
        assert token_multiple(profile) == {"fp8_blockwise": 128, "mxfp8": 32}.get(profile, 16)
    assert set(handed) <= set(_fields())


def _fields() -> list[str]:
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig

    return [f.name for f in dataclasses.fields(TransformerConfig)]


def test_spec_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from torl_mega.trainer.cpu import backend as cpu_backend

    cpu_backend.install()
    from torl_mega.trainer import layer_spec

    if torch.cuda.is_available():
        pytest.skip("looks at what a machine without CUDA chooses")
    assert layer_spec.choose_spec() == "local"
    if importlib.util.find_spec("transformer_engine") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ConfigError, match="Transformer Engine cannot be imported"):
            layer_spec.choose_spec()
        assert layer_spec.choose_spec("local") == "local"


def test_what_a_ranks_environment_says() -> None:
    from torl_mega.config import TrainerConfig
    from torl_mega.trainer.precision import kernel_environment

    def found(**settings: Any) -> dict[str, str]:
        return kernel_environment(TrainerConfig(mini_batch_samples=1, micro_batch_tokens=1, **settings))

    assert found() == found(precision="mxfp8") == {}
    assert found(precision="fp8_blockwise") == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    assert found(deterministic=True) == {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_NVLS_ENABLE": "0",
    }


def test_delayed_scaling_is_named_unfit(caplog: pytest.LogCaptureFixture) -> None:
    from torl_mega.config_file import load_config
    from torl_mega.planner.analyse import Hardware, analyse
    from torl_mega.planner.hardware import Assumptions

    for profile in ("default", "fp8_current"):
        warn_if_unfit(profile)
    check_precision("fp8_hybrid_delayed", HOPPER)  # what a report or a doctor asks of every profile
    assert not caplog.messages
    warn_if_unfit("fp8_hybrid_delayed")
    assert "fp8_hybrid_delayed is unfit for RL" in caplog.messages[0]
    config = load_config("conf/torl_7b.yaml", ["trainer.precision=fp8_hybrid_delayed"])
    warnings = analyse(config, Hardware(2, 8, "h100"), Assumptions()).warnings
    assert any("fp8_hybrid_delayed is unfit for RL" in warning for warning in warnings)
