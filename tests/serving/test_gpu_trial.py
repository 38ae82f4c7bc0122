"""`torl doctor --gpu` as far as a CPU goes: both Pythons, by value and over gloo, through SGLang's own code."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from torl_mega.launch import gpu_trial
from torl_mega.launch.checks import Check
from torl_mega.trainer import precision_trial


def found(**env: str) -> dict[str, Check]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        return {check.name: check for check in gpu_trial.trial(None)}


def test_both_pythons_pass_a_bucket_and_share_a_group() -> None:
    checks = found()
    assert {name: check.level for name, check in checks.items()} == {"gpu handle": "ok", "gpu group": "ok"}
    assert "by value (no GPU)" in checks["gpu handle"].detail
    assert "2 ranks of gloo" in checks["gpu group"].detail


def test_an_environment_that_cannot_read_weights_is_named(tmp_path: Path) -> None:
    """A Python beside ours whose SGLang lacks its deserialiser: the handle fails with its words, the group is still tried."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    checks = found(TORL_SGLANG_PYTHON=str(python))
    assert checks["gpu handle"].level == "fail"
    assert "server: ModuleNotFoundError: No module named 'sglang.srt'" in checks["gpu handle"].detail
    assert "trainer: RuntimeError: ModuleNotFoundError" in checks["gpu handle"].detail
    assert checks["gpu group"].level == "ok"


def test_a_gpu_that_is_there_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi's own ways: a row per GPU of the columns asked for, nothing (and success) when none is."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$1" in --query-gpu=) ;; --query-gpu=*) echo 0;; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tried: dict[str, list[str]] = {}

    def run(sides: dict[str, tuple[list[str], dict[str, str]]], names: list[str], folder: Path) -> list[Check]:
        tried.update({side: command for side, (command, _) in sides.items()})
        return [Check(f"gpu {name}", "ok", "") for name in names]

    monkeypatch.setattr(gpu_trial, "_run", run)
    assert set(found()) == {"gpu handle", "gpu group", "gpu linear default"}
    assert tried["server"][-2:] == ["cuda", "1"]
    assert tried["trainer"][1:3] == ["-m", "torl_mega.trainer.precision_trial"]


def test_a_side_that_hangs_ends_by_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid; exec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu_trial, "LIMIT_S", 8.0)
    checks = found(TORL_SGLANG_PYTHON=str(python))
    assert checks["gpu group"].level == "fail"
    assert "server: not done after 8 s" in checks["gpu group"].detail
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


class Linear(torch.nn.Linear):
    """With Transformer Engine's arguments; `off` of its product is added to it."""

    off = 0.0

    def __init__(self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=params_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.off)


def test_a_layer_with_wrong_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    module.Linear = Linear  # type: ignore[attr-defined]
    package.pytorch = module  # type: ignore[attr-defined]
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    assert "relative error 0.00" in precision_trial.try_linear("default", "cpu")
    monkeypatch.setattr(Linear, "off", 0.02)
    with pytest.raises(RuntimeError, match=r"more than 0\.01"):
        precision_trial.try_linear("default", "cpu")


def test_a_profile_that_this_machine_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert precision_trial.main(["fp8_current"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["name"] == "linear fp8_current"
    assert not said["ok"]
    assert "needs a Ada, Hopper or later GPU, found none" in said["detail"]
