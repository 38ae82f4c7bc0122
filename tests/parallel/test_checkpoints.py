"""Checkpoints: any layout to any layout, kills in the middle, damage refused in one line, conversion both ways."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hf_reference as ref
import psutil
import pytest
import torch
from layout_cases import Layout
from layout_worker import config_for
from safetensors.torch import load_file
from torchrun import ROOT, run_python

from torl_mega.errors import CheckpointError, ConfigError

HERE = Path(__file__).parent
FOUR = [
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(pipeline=2, virtual_pipeline=2, data=2),
    Layout(data=4, overlap=True),
    Layout(tensor=4),
    Layout(tensor=2, context=2, sequence=True),
    Layout(pipeline=4),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    ref.save_model(ref.make_model("qwen2", tied=True), folder / "qwen2_tied")
    return folder


def resharded(work: Path, savers: list[Layout], loaders: list[Layout], timeout_s: float) -> list[dict[str, Any]]:
    results, cases = work / "pairs.jsonl", work / "pairs.json"
    results.unlink(missing_ok=True)
    cases.write_text(json.dumps([[asdict(x) for x in savers], [asdict(x) for x in loaders], ["qwen2", True]]))
    run_python(HERE / "checkpoint_worker.py", results, work, cases, timeout_s=timeout_s)
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_saved_in_one_layout_resumed_in_another(work: Path) -> None:
    table = resharded(work, FOUR[:2], FOUR[1:3], 280.0)
    assert len(table) == 4
    assert all(row["weights"] <= 5e-7 for row in table), table


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_pair_of_layouts(work: Path) -> None:
    table = resharded(work, FOUR, FOUR, 3500.0)
    assert len(table) == 36
    assert all(row["weights"] <= 5e-7 for row in table), table


# ------------------------------------------------------------------------------------------------ kills


def start(work: Path, model: Path, steps: int, mode: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "resume_worker.py"), str(work), str(model), str(steps), mode]
    log = (work / "log.txt").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(work: Path, model: Path, steps: int, mode: str, timeout_s: float = 240.0) -> tuple[str, dict[int, Any]]:
    process = start(work, model, steps, mode)
    assert process.wait(timeout_s) == 0, (work / "log.txt").read_text()[-3000:]
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    by_step: dict[int, Any] = {}
    for line in lines:
        known = by_step.setdefault(line["step"], line)
        assert known == line, f"step {line['step']} came out differently after a restart"
    return json.loads((work / "final.json").read_text()), by_step


def killed_runs(work: Path, kills: int, steps: int, mode: str) -> None:
    model, rng = work / "qwen2_tied", random.Random(3)
    calm, rough = work / f"calm_{mode}", work / f"rough_{mode}"
    for folder in (calm, rough):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    began = time.monotonic()
    wanted = finish(calm, model, steps, mode)
    whole_s = time.monotonic() - began
    for _ in range(kills):
        process = start(rough, model, steps, mode)
        time.sleep(rng.uniform(0.3, 0.95) * whole_s)  # where it falls, imports, steps and saves alike, is the point
        kill_group(process)
        (rough / "final.json").unlink(missing_ok=True)
        stuck = sorted(rough.glob("step_*"))[2:-1]
        for folder in stuck:  # go back, so that every kill has something left to interrupt
            shutil.rmtree(folder)
    assert finish(rough, model, steps, mode) == wanted


def test_killed_run_equals_calm_run(work: Path) -> None:
    killed_runs(work, 2, 4, "sync")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ten_kills(work: Path, mode: str) -> None:
    killed_runs(work, 10, 6, mode)


# ------------------------------------------------------------------------------------------------ damage and conversion


@pytest.fixture(scope="module")
def trainer(work: Path) -> Iterator[Any]:
    from torl_mega.trainer import parallel

    config = config_for(Layout(), work / "qwen2_tied")
    parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    yield MegatronTrainer(config)
    parallel.destroy()


def damage(folder: Path, how: str) -> None:
    data = max((p for p in folder.iterdir() if p.suffix == ".distcp"), key=lambda p: p.stat().st_size)
    if how == "corrupt":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(bytes(content))
    elif how == "truncated":
        os.truncate(data, data.stat().st_size // 2)
    elif how == "missing file":
        data.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(
            text.replace('"vocab": 201', '"vocab": 300')
            if how == "vocab"
            else text.replace('"num_layers": 8', '"num_layers": 9')
        )


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("corrupt", "the checkpoint is damaged"),
        ("truncated", "the checkpoint is damaged"),
        ("missing file", "is missing"),
        ("no manifest", "not complete"),
        ("model", "belongs to another model: num_layers 9 (model.path: 8)"),
        ("vocab", "belongs to another model: vocab 300 (model.path: 201)"),
    ],
)
def test_damaged_checkpoint_is_refused_in_one_line(trainer: Any, work: Path, how: str, text: str) -> None:
    good = work / "good" / "step_000001"
    if not good.is_dir():
        trainer.save(good, extra={"steps_done": 1})
    bad = work / "bad" / "step_000001"
    shutil.rmtree(bad.parent, ignore_errors=True)
    shutil.copytree(good, bad)
    damage(bad, how)
    before = {name: t.clone() for name, t in trainer.weights()}
    with pytest.raises(CheckpointError) as caught:
        trainer.load(bad)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in trainer.weights())
    assert trainer.load(good) == {"steps_done": 1}


def test_a_save_after_megatrons_helper_was_killed(trainer: Any, work: Path) -> None:
    folder = work / "helper"
    trainer.save(folder / "step_000001", extra={})
    helpers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert helpers
    for helper in helpers:
        helper.kill()
        helper.wait()
    trainer.save(folder / "step_000002", extra={"steps_done": 2})
    assert trainer.load(folder / "step_000002") == {"steps_done": 2}


def test_export_loads_in_plain_transformers(trainer: Any, work: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer.export_hf(work / "exported")
    exported: Any = AutoModelForCausalLM.from_pretrained(work / "exported", attn_implementation="eager").eval()
    original = ref.make_model("qwen2", tied=True).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, original(ids).logits)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_no_number_skips_its_update_and_repeated_stops_the_run(trainer: Any, value: str) -> None:
    from torl_mega.errors import GuardError

    def spoiled_step() -> Any:
        trainer.forward_backward(scored)
        trainer.model[0].buffers[0].grad_data[0] = float(value)
        return trainer.optim_step()

    scored = trainer.old_logprobs(ref.make_samples(0))
    before = {name: t.clone() for name, t in trainer.weights()}
    for _ in range(3):
        assert spoiled_step()["faults/skipped_updates"] == 1
    assert all(torch.equal(t, before[name]) for name, t in trainer.weights())
    with pytest.raises(GuardError, match=rf"gradient norm is {value} at optimizer step \d+, 4 times in a row"):
        spoiled_step()
    trainer.forward_backward(scored)
    assert "faults/skipped_updates" not in trainer.optim_step()
    assert spoiled_step()["faults/skipped_updates"] == 1  # counted from 1 again
    trainer.forward_backward(scored)
    trainer.optim_step()
    assert all(torch.isfinite(t).all() for _, t in trainer.weights())


def tool(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_conversion_keeps_every_bit(work: Path) -> None:
    source, megatron, back = work / "qwen2_tied", work / "converted", work / "back"
    done = tool("convert_hf_to_megatron.py", "--hf", str(source), "--out", str(megatron), "--tp", "2", "--pp", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    done = tool("convert_megatron_to_hf.py", "--checkpoint", str(megatron), "--out", str(back), "--max-file-mb", "0.3")
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = load_file(source / "model.safetensors")
    parts = sorted(back.glob("*.safetensors"))
    assert len(parts) > 1
    found = {k: v for part in parts for k, v in load_file(part).items()}
    assert set(found) == set(wanted)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_conversion_refuses_in_one_line(work: Path) -> None:
    for args, text in (
        (("--hf", str(work / "nowhere")), "error: model.path ="),
        (("--hf", str(work / "qwen2_tied"), "--tp", "3"), "error: parallel.tensor = 3 does not divide"),
    ):
        done = tool("convert_hf_to_megatron.py", *args, "--out", str(work / "x"))
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(text)
        assert not (work / "x").exists()


def test_case_3_no_converter_replaces_its_source_or_what_it_did_not_write(work: Path) -> None:
    source, holder = work / "qwen2_tied", work / "holder"
    shutil.copytree(source, holder / "models/qwen")
    before = {path: path.stat().st_mtime_ns for path in holder.rglob("*")}
    for out in (holder, holder / "models", holder / "models/qwen"):
        for name in ("convert_hf_to_megatron.py", "export_fp8.py"):
            done = tool(name, "--hf", str(holder / "models/qwen"), "--out", str(out))
            assert done.returncode == 1, name
            assert "is or holds the source" in done.stderr.strip().splitlines()[-1]
    done = tool(
        "convert_megatron_to_hf.py", "--checkpoint", str(work / "nowhere"), "--out", str(holder / "models/qwen")
    )
    assert done.returncode == 1
    assert "not an earlier result" in done.stderr.strip().splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in holder.rglob("*")} == before


def test_incomplete_hf_folder_is_refused(work: Path) -> None:
    from safetensors.torch import save_file

    from torl_mega.layout import describe_model, read_hf_config
    from torl_mega.trainer.weights.hf_io import HfReader

    broken = work / "broken"
    shutil.copytree(work / "qwen2_tied", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor model\.norm\.weight is missing"):
        HfReader(broken, describe_model(read_hf_config(broken)))
