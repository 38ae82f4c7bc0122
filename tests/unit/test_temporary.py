"""A task's folder for temporary files: gone with it, or with the next task on that node where it was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from torl_mega.process.temporary import OWNER as LOCK
from torl_mega.process.temporary import temporary_folder

OWNER = """
import pathlib, signal, subprocess, sys
from torl_mega.process.temporary import OWNER as LOCK
from torl_mega.process.temporary import temporary_folder
with temporary_folder(sys.argv[1]) as (folder, lock):
    pathlib.Path(folder, "deep").mkdir()
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, pass_fds=[lock] if sys.argv[2:] else [])
    print(folder, child.pid, flush=True)
    signal.pause()
"""


def owner(base: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path, int]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(base), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder, child = process.stdout.readline().split()
    return process, Path(folder), int(child)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_it_goes_with_its_owner(tmp_path: Path) -> None:
    with temporary_folder(str(tmp_path)) as (folder, _):
        Path(folder, "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_owners_left_goes_at_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    others = [tmp_path / "torl-results", tmp_path / "other"]
    (others[0] / "sub").mkdir(parents=True)
    (others[1]).mkdir()
    (others[1] / LOCK).touch()
    dead, left, orphan = owner(tmp_path)
    alive, held, its_child = owner(tmp_path)
    outlived, still, child = owner(tmp_path, "the child keeps it")
    (tmp_path / "torl-link").symlink_to(left)
    end(dead)
    outlived.send_signal(signal.SIGKILL)
    outlived.wait()
    try:
        with temporary_folder(str(tmp_path)) as (folder, _):
            assert not left.exists()
            assert {*others, held, still, Path(folder), tmp_path / "torl-link"} == set(tmp_path.iterdir())
    finally:
        children = [psutil.Process(pid) for pid in (orphan, its_child, child)]
        for process in children:
            process.kill()
        psutil.wait_procs([children[0], children[2]], timeout=20)  # their locks go with the last of their files
        outlived.communicate()
        end(alive)
    with temporary_folder(str(tmp_path)):
        assert not held.exists()
        assert not still.exists()


def test_another_users_is_left_alone(tmp_path: Path) -> None:
    left = tmp_path / "torl-theirs"
    left.mkdir()
    (left / LOCK).touch()
    moved = subprocess.run(["chown", "12345", str(left)], capture_output=True, check=False).returncode == 0
    with temporary_folder(str(tmp_path)):
        assert left.exists() == moved  # only root can give a folder away; else it is ours, and nobody's
