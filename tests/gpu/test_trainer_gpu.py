"""The trainer on a real GPU: Transformer Engine against HF, FP8 against bf16, the fused optimizer, NCCL over two devices.

make test-gpu
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parallel"))
WORKER = Path(__file__).with_name("gpu_worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 64 and widths that are multiples of 128, as FP8 kernels want them."""
    import hf_reference as ref

    path = tmp_path_factory.mktemp("gpu") / "model"
    ref.save_model(
        ref.make_model(
            "qwen2", tied=False, dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, vocab_size=512
        ),
        path,
    )
    return path


def run(model: Path, ranks: int, *overrides: str) -> dict[str, Any]:
    out = model.parent / "out.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(WORKER)]
    done = subprocess.run([*command, str(model), str(out), *overrides], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def bf16(model: Path) -> dict[str, Any]:
    return run(model, 1)


def test_bf16_agrees_with_hf(bf16: dict[str, Any]) -> None:
    assert bf16["layer_spec"] == "te"
    assert bf16["mean_abs_logprob_diff_to_hf"] <= 2e-2
    assert "torch.optim" not in bf16["optimizer"]
    assert bf16["moved_weights"] == bf16["num_weights"]


@pytest.mark.parametrize("profile", ["fp8_hybrid_delayed", "fp8_current", "fp8_blockwise", "mxfp8"])
def test_fp8_stays_near_bf16(model: Path, bf16: dict[str, Any], profile: str) -> None:
    if profile not in bf16["usable_profiles"]:
        pytest.skip(f"this machine does not run {profile}")
    found = run(model, 1, f"trainer.precision={profile}")
    assert found["mean_abs_logprob_diff_to_hf"] <= 0.15
    assert found["grad_norm"] == pytest.approx(bf16["grad_norm"], rel=0.1)


def test_offloaded_optimizer_takes_the_same_step(model: Path, bf16: dict[str, Any]) -> None:
    found = run(model, 1, "trainer.optimizer_offload=true")
    assert found["grad_norm"] == pytest.approx(bf16["grad_norm"], rel=1e-3)
    assert found["moved_weights"] == found["num_weights"]


@pytest.mark.parametrize("override", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"])
def test_nccl_layouts_agree(model: Path, bf16: dict[str, Any], override: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = run(model, 2, override)
    assert found["loss"] == pytest.approx(bf16["loss"], abs=1e-2)
    assert found["grad_norm"] == pytest.approx(bf16["grad_norm"], rel=0.01)
