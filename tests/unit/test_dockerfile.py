"""The Dockerfile, as far as a machine without Docker's daemon can check it: read, resolved for its Python, and its own
install step run."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) with continuation lines joined and comments left out."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_every_instruction_is_known() -> None:
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "LABEL", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} == known


def test_the_base_is_pinned_by_tag_and_digest() -> None:
    assert of("FROM")[0].startswith("nvcr.io/nvidia/pytorch:${NGC_TAG}${NGC_DIGEST:+@${NGC_DIGEST}}")
    assert re.fullmatch(r"NGC_TAG=\d\d\.\d\d-py3", of("ARG")[0])
    stages = {line.split(" AS ")[1] for line in of("FROM") if " AS " in line}
    assert {line.split()[0] for line in of("FROM")[1:]} <= stages


def test_the_images_own_torch_te_and_apex_stay() -> None:
    installs = " ".join(of("RUN"))
    assert not re.search(r"pip install[^&]*\b(torch|apex|transformer.engine)\b", installs)
    gpu = [entry for entry in GROUPS["gpu"] if isinstance(entry, str)]
    assert not any(re.match(r"(torch|apex|transformer.engine)\b", entry) for entry in gpu)
    assert "cmp - /tmp/torch" in installs, "the build stops when the image's torch was replaced"
    assert "--system-site-packages /opt/torl" in installs
    assert "--system-site-packages /opt/sglang" not in installs


def test_it_ends_as_a_user_with_labels_entry_point_and_health_check() -> None:
    assert of("USER") == ["${UID}"]
    assert of("ENTRYPOINT") == ['["torl"]']
    assert "doctor" in of("HEALTHCHECK")[0]
    labels = of("LABEL")[0]
    for name in ("title", "version", "revision", "licenses", "base.name"):
        assert f"org.opencontainers.image.{name}=" in labels


def test_what_is_copied_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    for copy in (line for line in of("COPY") if not line.startswith("--from")):
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source


def test_the_build_ends_with_one_line_when_an_environment_does_not_fit() -> None:
    """The two pins that must agree, in both environments; torl_mega.launch.environments is tested by itself."""
    installs = of("RUN")
    assert sum('|| { echo "error: group' in line for line in installs) == 2
    assert "import transformer_engine.pytorch, apex, megatron.core" in " ".join(installs)
    assert "/opt/sglang/bin/python -m pip check" in " ".join(installs)
    assert any("torl_mega.launch.environments /opt/torl/bin/python /opt/sglang/bin/python" in line for line in installs)
    assert any(str(entry).startswith("nvidia-nccl-cu13==") for entry in GROUPS["sglang-gpu"])
    assert any(str(entry).startswith("nvidia-resiliency-ext==") for entry in GROUPS["gpu"])


def test_groups_that_it_installs_are_pinned_exactly() -> None:
    named = set(re.findall(r"--group (\S+)", " ".join(of("RUN"))))
    assert named == {"gpu", "sglang-gpu"}
    for group in (*named, "core"):
        for entry in GROUPS[group]:
            assert isinstance(entry, dict) or re.fullmatch(r"[A-Za-z0-9_.\-\[\]]+==[\w.!+]+", entry), entry


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("groups", [("gpu", "dev"), ("sglang-gpu",), ("mcore-next", "te")], ids="+".join)
def test_every_pinned_set_resolves_for_python_3_12(groups: tuple[str, ...], tmp_path: Path) -> None:
    """What pip would install on the image's Python and its Ubuntu 24.04; the other groups are for machines without CUDA.
    What `make gpu-sources` unpacks comes without its dependencies, there as here."""
    target = ["--python-version", "3.12"]
    for platform in ("manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 40))):
        target += ["--platform", f"{platform}_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--only-binary=:all:", *target]
    command += ["--target", str(tmp_path), *(word for group in groups for word in ("--group", group))]
    command += ["--no-deps"] if "te" in groups else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_install_step_gives_a_working_torl(tmp_path: Path) -> None:
    """The last RUN of the image in a fresh environment on this machine: install without dependencies, ask for help."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(venv)], check=True)
    install = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(ROOT)], check=True, timeout=280)
    code = "import torl_mega.launch.plan, torl_mega.launch.doctor; print(torl_mega.launch.plan.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}, cwd=tmp_path,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path / "site"))
