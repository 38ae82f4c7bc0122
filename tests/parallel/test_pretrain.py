"""`torl pretrain` against plain transformers and torch: loss, gradient and weights; a stopped run gives the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_model import make_tiny_model
from torchrun import ROOT, free_port, run_python
from transformers import AutoTokenizer, Qwen2ForCausalLM

STEPS, LIMIT = 3, 1e-5
ROWS = [
    {"text": "One sentence that is trained from its second token on."},
    {"prompt": "Q: 6*7\nA:", "completion": " It is \\boxed{42}."},
    {
        "prompt": "Q: 3+4\nA:",
        "pieces": [["\n```python\nprint(3+4)\n```\n```output", True], ["\n7\n```\n", False], ["So 7.", True]],
    },
    {"prompt": "A long prompt " * 6, "completion": "short"},
    {"prompt": "", "completion": "from nothing"},
]  # fmt: skip


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model", num_kv_heads=2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tree = {
        "base": str(ROOT / "conf/quickstart.yaml"),
        "name": "texts",
        "runs_dir": str(tmp_path / "runs"),
        "num_steps": STEPS,
        "model": {"path": str(tmp_path / "model")},
        "pretrain": {"data": str(tmp_path / "rows.jsonl"), "rows_per_step": len(ROWS)},
        "data": {"max_prompt_tokens": 100},
        "rollout": {"max_response_tokens": 60, "temperature": 0.7},
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5, "clip_grad": 0.5},
        "trainer": {"micro_batch_tokens": 160, "mini_batch_samples": 256},
        "logging": {"tensorboard": False},
    }
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "conf.yaml"


def pieces_of(row: dict) -> list[tuple[str, bool]]:
    if "text" in row:
        return [(row["text"], True)]
    written = [(row["completion"], True)] if "completion" in row else [tuple(piece) for piece in row["pieces"]]
    return [(row["prompt"], False), *written]


def reference(model_path: Path, loss_on: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of STEPS steps over all rows, one after the other, and the weights after them."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    groups = [[p for p in model.parameters() if (p.dim() > 1) == matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-5,
    )  # fmt: skip
    losses, norms = [], []
    for _ in range(STEPS):
        total, count = torch.zeros(()), 0
        for row in ROWS:
            ids, labels = [], []
            for text, written in pieces_of(row):
                piece = tokenizer.encode(text, add_special_tokens=False)
                ids += piece
                labels += piece if written or loss_on == "all" else [-100] * len(piece)
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
            logits = model(torch.tensor([ids])).logits[0, :-1]
            target = torch.tensor(labels[1:])
            total = total + torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
            count += int((target != -100).sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


@pytest.mark.parametrize(("ranks", "loss_on"), [(1, "all"), (2, "completion")])
def test_loss_gradient_and_weights_are_those_of_hf(conf: Path, ranks: int, loss_on: str) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port()), "-m"]
    layout = ["parallel.tensor=2", "parallel.sequence=true"] if ranks == 2 else []
    run_python(*launch, "torl_mega.pretrain", conf, f"pretrain.loss_on={loss_on}", *layout)
    run = conf.parent / "runs/texts"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses, norms, weights = reference(conf.parent / "model", loss_on)
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=LIMIT)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=LIMIT * 10)
    assert all(row["num_micro_batches"] > 1 for row in rows), "packing into one micro-batch proves little"
    start = Qwen2ForCausalLM.from_pretrained(conf.parent / "model").state_dict()
    found = Qwen2ForCausalLM.from_pretrained(run / "hf").state_dict()
    assert max(float((found[name] - weight).abs().max()) for name, weight in weights.items()) <= LIMIT
    assert max(float((found[name] - start[name]).abs().max()) for name in weights) > 100 * LIMIT


def test_a_run_that_goes_on_gives_the_same_weights(conf: Path) -> None:
    def run(name: str, *overrides: str) -> bytes:
        torl = str(Path(sys.executable).with_name("torl"))
        command = [torl, "pretrain", str(conf), f"name={name}", "pretrain.rows_per_step=2", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return (conf.parent / "runs" / name / "hf/model.safetensors").read_bytes()

    drops = ["data.max_prompt_tokens=20", "data.overlong_prompts=drop", "trainer.micro_batch_tokens=80"]
    straight = run("straight", "num_steps=4", *drops)
    half = run("stopped", "num_steps=2", *drops)
    assert run("stopped", "num_steps=4", *drops) == straight != half
    steps = [json.loads(line)["step"] for line in (conf.parent / "runs/stopped/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
