"""What launch/common.sh mounts into a container, seen by an `apptainer` that starts the command without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APPTAINER = """#!/bin/bash
while [ $# -gt 0 ]; do
  case "$1" in --bind) echo "$2" >>"$BINDS"; shift 2 ;; --pwd) shift 2 ;; exec | --nv) shift ;; *) break ;; esac
done
shift; exec "$@"
"""


@pytest.fixture
def freeze(tmp_path: Path):
    """Sources common.sh and freezes a run, in a container; returns (exit code, what was said, mounts of each start)."""
    tool = tmp_path / "bin/apptainer"
    tool.parent.mkdir()
    tool.write_text(APPTAINER)
    tool.chmod(0o755)

    def run(home: Path, *, mounts: str = "", overrides: str = "") -> tuple[int, str, list[str]]:
        binds = tmp_path / "binds"
        binds.touch()
        script = (
            f'. launch/common.sh; torl_environment conf/quickstart.yaml; torl_freeze {os.getpid()}; echo "at $JOB_DIR"'
        )
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            env={
                "PATH": f"{tool.parent}:/usr/bin:/bin", "BINDS": str(binds), "TORL_HOME": str(home),
                "TORL_IMAGE": "image.sif", "TORL_CONTAINER": "apptainer", "TORL_PYTHON": sys.executable,
                "TORL_MOUNTS": mounts, "TORL_OVERRIDES": overrides,
            },
        )  # fmt: skip
        return done.returncode, done.stdout, binds.read_text().splitlines()

    return run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout of its own: links to this one's parts."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("torl_mega", "launch", "conf"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_runs_outside_of_the_checkout_are_mounted_before_they_are_written_to(
    freeze, home: Path, tmp_path: Path
) -> None:
    code, said, mounts = freeze(home, overrides=f"runs_dir={tmp_path}/scratch/runs")
    assert code == 0, said
    assert mounts == [f"{home}:{home}", f"{home}:{home},{tmp_path}/scratch/runs:{tmp_path}/scratch/runs"]
    assert f"at {tmp_path}/scratch/runs/quickstart/jobs/" in said


def test_runs_that_are_a_link_are_mounted_where_it_points(freeze, home: Path, tmp_path: Path) -> None:
    (tmp_path / "fast").mkdir()
    (home / "runs").symlink_to(tmp_path / "fast")
    code, said, mounts = freeze(home)
    assert code == 0, said
    assert mounts[-1] == f"{home}:{home},{tmp_path}/fast:{tmp_path}/fast"


def test_runs_in_the_checkout_need_no_mount_of_their_own(freeze, home: Path) -> None:
    code, said, mounts = freeze(home)
    assert code == 0, said
    assert set(mounts) == {f"{home}:{home}"}


def test_a_checkout_that_cannot_be_mounted_is_named(freeze, home: Path, tmp_path: Path) -> None:
    spaced = home.rename(tmp_path / "my home")
    code, said, mounts = freeze(spaced)
    assert (code, mounts) == (1, [])
    assert said == (
        f"torl: error: TORL_HOME = {spaced} has a space, comma or colon, which no container can mount; "
        "link to the checkout from another place\n"
    )


def test_a_mount_with_a_space_is_one_mount(freeze, home: Path, tmp_path: Path) -> None:
    (tmp_path / "my data").mkdir()
    assert freeze(home, mounts=f"{tmp_path}/my data:/data")[0] == 0
    code, said, _ = freeze(home, mounts=f"{tmp_path}/my data:/data,{tmp_path}/none at all:/x")
    assert code == 1
    assert f"TORL_MOUNTS names {tmp_path}/none at all, which is not there" in said


def test_local_sh_reaches_the_command_line(tmp_path: Path) -> None:
    """launch/local.sh starts `python -m torl_mega.cli`."""
    command = [sys.executable, "-m", "torl_mega.cli", "train", f"{tmp_path}/none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no such config file" in done.stderr
