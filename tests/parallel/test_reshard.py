"""The memory that `weights()` takes beside the parameters, measured on every rank."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import hf_reference as ref
from layout_cases import Layout
from torchrun import torchrun

HIDDEN, FFN = 256, 512
SLACK = 4096  # norms and biases


def test_extra_memory_is_two_tensors_at_most(tmp_path: Path) -> None:
    model = ref.make_model("qwen2", tied=False, hidden_size=HIDDEN, intermediate_size=FFN)
    ref.save_model(model, tmp_path / "model")
    layout, out = tmp_path / "layout.json", tmp_path / "out.json"
    layout.write_text(json.dumps(asdict(Layout(tensor=2, pipeline=2))))
    torchrun(4, Path(__file__).with_name("reshard_worker.py"), out, tmp_path / "model", layout)
    found = json.loads(out.read_text())
    fc1 = 2 * FFN * HIDDEN * 4  # the largest parameter: gate and up of all tensor ranks
    first, *others = found["peaks"]
    print(f"largest parameter {fc1} bytes, peaks {found['peaks']}, all parameters {found['parameters']}")
    assert first <= fc1 * 1.5 + SLACK  # both gathered, and one of them as HF has it
    assert others[1] <= fc1 * 1.5 + SLACK  # tensor rank 0 of the second stage
    assert max(others[0], others[2]) <= SLACK  # tensor rank 1 only sends
    assert found["parameters"] > 10 * fc1  # so that holding the model would show
