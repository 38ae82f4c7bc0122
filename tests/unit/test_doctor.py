"""The doctor finds what is wrong: each check is shown a machine, model or placement with that fault."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.launch import checks, doctor, preflight
from torl_mega.launch.checks import Check
from torl_mega.planner.placement import place, read_placement

QUICK = Path("conf/quickstart.yaml")


def config(*overrides: str) -> Config:
    return load_config(QUICK, overrides)


def only(findings: list[Check], name: str) -> Check:
    found = [check for check in findings if check.name == name]
    assert len(found) == 1, findings
    return found[0]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the quickstart's model, to be broken."""
    return Path(shutil.copytree("conf/quickstart", tmp_path / "model"))


def check(name: str, *overrides: str) -> Check:
    """The one finding of one config check."""
    probe = {
        "model": checks.model,
        "tokenizer": checks.tokenizer,
        "data": checks.data,
        "run folder": checks.run_folder,
        "sandbox": checks.sandbox,
    }
    return only(checks.guarded(name, lambda: probe[name](config(*overrides))), name)


def test_the_quickstart_is_well() -> None:
    for name in ("model", "tokenizer", "data"):
        assert check(name).level == "ok"


def test_cut_weights_are_found(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = check("model", f"model.path={broken}")
    assert found.level == "fail"
    assert "copy it again" in found.detail


def test_missing_weight_files_are_named(broken: Path) -> None:
    (broken / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
    )
    assert "model-00002-of-00002" in check("model", f"model.path={broken}").detail


def test_a_missing_model_is_named() -> None:
    assert "models/none" in check("model", "model.path=models/none").detail


def test_a_tokenizer_of_another_model_is_found(broken: Path) -> None:
    tree = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(tree | {"vocab_size": 100}))
    found = check("tokenizer", f"model.path={broken}")
    assert found.level == "fail"
    assert "do not belong together" in found.detail


def test_missing_data_is_named(tmp_path: Path) -> None:
    assert check("data", f"data.train={tmp_path}/none.parquet").level == "fail"
    found = check("data", f"eval.data=[{tmp_path}/gone.parquet]")
    assert found.level == "fail"
    assert "gone.parquet" in found.detail
    assert check("data", "eval.data=[data/aime24.jsonl]").level == "fail"
    assert check("data", "eval.data=[arithmetic:1,data/aime24.jsonl]").level == "warn"  # as the run: left out, and said


def test_a_sandbox_that_does_not_answer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ADDRESS_LIMIT_S", 0.1)
    found = check("sandbox", f"sandbox.address=unix:{tmp_path}/none")
    assert found.level == "fail"
    assert f"no sandbox listens on unix:{tmp_path}/none" in found.detail


def test_a_run_folder_that_is_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert check("run folder", f"runs_dir={tmp_path}/runs/x").level == "fail"


def test_too_little_disk_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # the file system cannot be filled from a unit test: only its answer is replaced
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    findings = checks.guarded("run folder", lambda: checks.run_folder(config(f"runs_dir={tmp_path}")))
    assert "checkpoint.keep_last" in only(findings, "disk").detail


@pytest.mark.parametrize(("port", "whose"), [(15101, "sandbox 0"), (15200, "server 0"), (15201, "ranks of server 0")])
def test_taken_ports_are_named(port: int, whose: str) -> None:
    plan, _ = place(config("cluster.gpu=cpu"), nodes=1, gpus=1, gpu="cpu", hosts=("n0",), base_port=15100)
    assert plan is not None
    assert only(preflight.placement_checks(plan, "n0"), "ports").level == "ok"
    with socket.socket() as listener:
        listener.bind(("", port))
        listener.listen()
        found = only(preflight.placement_checks(plan, "n0"), "ports")
    assert found.level == "fail"
    assert f"{port} ({whose})" in found.detail


def test_unknown_hosts_are_named() -> None:
    plan, _ = place(config(), nodes=1, gpus=1, gpu="cpu", hosts=("no-such-host.invalid",))
    assert plan is not None
    assert "no-such-host.invalid" in only(preflight.placement_checks(plan, "x"), "host names").detail


def test_a_plan_for_gpus_fails_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    plan, _ = place(load_config("conf/torl_7b.yaml"), nodes=1, gpus=8, gpu="h100")
    assert only(checks.gpu_checks(plan), "gpus").level == "fail"
    assert only(checks.gpu_checks(None), "gpus").level == "ok"


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ("NVIDIA H100 80GB HBM3, 81559, 4, 0\n" * 7, "7 x NVIDIA H100 80GB HBM3; the plan wants 8"),
        ("NVIDIA H100 80GB HBM3, 81559, 4, 0\n" * 7 + "NVIDIA H100 80GB HBM3, 81559, 60000, 0\n", "GPU 7 is in use"),
        ("NVIDIA H100 80GB HBM3, 81559, 4, 2\n" * 8, "GPU 0 has 2 uncorrected ECC errors"),
    ],
)
def test_what_nvidia_smi_says_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, finding: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'E'\n{rows}E\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    plan, _ = place(load_config("conf/torl_7b.yaml"), nodes=1, gpus=8, gpu="h100")
    assert any(finding in c.detail and c.level == "fail" for c in checks.gpu_checks(plan))


def test_the_adam_in_use_is_named_and_a_profile_that_cannot_run() -> None:
    adam, profile = checks.guarded("trainer", lambda: checks.trainer(config("trainer.precision=mxfp8")))
    assert "Adam: torl_mega.trainer.cpu.adam.FusedAdam" in adam.detail or torch.cuda.is_available()
    assert profile.level == "fail"
    assert "trainer.precision = mxfp8 needs" in profile.detail


def test_sglangs_python_is_the_one_that_servers_start_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORL_SGLANG_PYTHON", "/nowhere/python")
    found = only(checks.guarded("packages", checks.packages), "sglang")
    assert found.level == "fail"
    assert "/nowhere/python" in found.detail


def test_an_unknown_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORL_IFNAME", "bond77")
    assert "bond77 is not here" in only(checks.guarded("network", checks.network), "network interface").detail


def test_a_node_whose_peers_are_loopback_to_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORL_IFNAME", raising=False)
    two, _ = place(config("cluster.gpu=cpu"), nodes=2, gpus=1, gpu="cpu", hosts=("n0", "127.0.1.1"))
    one, _ = place(config("cluster.gpu=cpu"), nodes=1, gpus=1, gpu="cpu", hosts=("n0",))
    assert two is not None
    assert one is not None
    found = only(preflight.placement_checks(two, "n0"), "address")
    assert (found.level, "set TORL_IFNAME" in found.detail) == ("fail", True)
    assert only(preflight.placement_checks(one, "n0"), "address").level == "ok"
    monkeypatch.setenv("TORL_IFNAME", "lo")  # who says so wants it
    assert only(preflight.placement_checks(two, "n0"), "address").level == "ok"


def test_a_check_that_breaks_is_a_finding() -> None:
    def bad():
        yield Check("x", "ok", "fine")
        raise RuntimeError("boom")

    assert [c.level for c in checks.guarded("x", bad)] == ["ok", "fail"]


def test_nodes_are_collected_into_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, _ = place(config("cluster.gpu=cpu"), nodes=3, gpus=1, gpu="cpu", hosts=("n0", "n1", "n2"))
    assert plan is not None
    file = tmp_path / "placement"
    file.write_text(plan.to_json())
    well = [{"name": "python", "level": "ok", "detail": "3.11"}]
    for number, host in enumerate(plan.hosts):
        told = {"checks": well, "address": f"10.0.0.{number}", "interface": "ib0"}
        (tmp_path / f"{host}.json").write_text(json.dumps(told))
    assert doctor.collect(tmp_path, file) == 0
    assert "3 nodes, all well" in capsys.readouterr().out
    reached = {(p.host, p.reached_at, p.interface) for p in read_placement(file).processes}
    assert reached == {("n0", "10.0.0.0", "ib0"), ("n1", "10.0.0.1", "ib0"), ("n2", "10.0.0.2", "ib0")}
    bad = {"checks": [{"name": "disk", "level": "fail", "detail": "full"}], "address": None, "interface": None}
    (tmp_path / "n1.json").write_text(json.dumps(bad))
    (tmp_path / "n2.json").unlink()
    (tmp_path / "2.log").write_text("srun: error: image not found\n")
    assert doctor.collect(tmp_path, file) == 1
    out = capsys.readouterr().out
    assert "n1" in out
    assert "full" in out
    assert "image not found" in out
    assert "n0" not in out


def test_what_is_wrong_is_summed_up_with_each_cause_once() -> None:
    found = [Check("a", "ok", "x"), Check("b", "fail", "no y; make it"), Check("c", "fail", "no y; make it")]
    found.append(Check("d", "warn", "slow; wait"))
    assert doctor.summed_up(found) == [
        "2 of 4 checks fail:",
        "  b, c: no y; make it",
        "1 of 4 checks warn:",
        "  d: slow; wait",
    ]
    assert doctor.summed_up(found[:1]) == ["1 checks, all well"]
