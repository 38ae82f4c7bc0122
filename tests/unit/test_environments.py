"""The trainer's Python beside SGLang's: what differs is one line, asked of stand-in interpreters with packages of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from torl_mega.config_file import load_config
from torl_mega.launch import checks
from torl_mega.launch.environments import differences, main
from torl_mega.planner.placement import place

NVRX = 'raise AssertionError("Minimum required nvidia-resiliency-ext package version is 0.6.0.")'


def python(folder: Path, *, nccl: str, megatron: str = "__version__ = '0.19.2'") -> str:
    """A python whose torch carries this NCCL, whose megatron-core is this text, and which has sglang's metadata."""
    site = folder / "site"
    (site / "torch").mkdir(parents=True)
    version = tuple(map(int, nccl.split(".")))
    (site / "torch/__init__.py").write_text(
        "import types\n__version__ = '2.14.1'\nversion = types.SimpleNamespace(cuda='13.3')\n"
        f"cuda = types.SimpleNamespace(nccl=types.SimpleNamespace(version=lambda: {version}))\n"
    )
    (site / "megatron/core/dist_checkpointing").mkdir(parents=True)
    (site / "megatron/core/__init__.py").write_text(megatron)
    (site / "megatron/core/dist_checkpointing/__init__.py").touch()
    (site / "sglang-0.5.23.dist-info").mkdir()
    (site / "sglang-0.5.23.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_environments_that_fit_have_nothing_to_say(tmp_path: Path) -> None:
    both = [python(tmp_path / name, nccl="2.30.7") for name in ("trainer", "sglang")]
    found, problems = differences(*both)
    assert not problems
    assert found[both[0]] == {"torch": "2.14.1", "nccl": "2.30.7", "megatron-core": "0.19.2"}
    assert found[both[1]] == {"torch": "2.14.1", "nccl": "2.30.7", "sglang": "0.5.23"}


@pytest.mark.parametrize(
    ("trainer", "sglang", "wanted"),
    [
        ({"nccl": "2.29.7"}, {"nccl": "2.30.7"}, "NCCL is 2.29.7 under"),
        ({"nccl": "2.30.7", "megatron": NVRX}, {"nccl": "2.30.7"}, "Minimum required nvidia-resiliency-ext"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: dict[str, str], sglang: dict[str, str], wanted: str
) -> None:
    assert main([python(tmp_path / "trainer", **trainer), python(tmp_path / "sglang", **sglang)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torl: error: ")
    assert wanted in line


def test_an_environment_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    _, (problem,) = differences(python(tmp_path / "trainer", nccl="2.30.7"), str(tmp_path / "nowhere"))
    assert "nowhere cannot be used" in problem


def test_the_preflight_of_a_gpu_job_compares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 0, 0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("TORL_SGLANG_PYTHON", python(tmp_path / "sglang", nccl="2.30.7"))
    monkeypatch.setattr(sys, "executable", python(tmp_path / "trainer", nccl="2.29.7"))
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())  # apex, Transformer Engine
    plan, _ = place(load_config("conf/torl_1.5b.yaml"), nodes=1, gpus=1, gpu="h100")
    found = [check for check in checks.gpu_checks(plan) if check.name == "environments"]
    assert [check.level for check in found] == ["fail"]
    assert "NCCL is 2.29.7" in found[0].detail
