"""Starting `torl train` as a user does, and finding everything that a run started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

TORL = str(Path(sys.executable).with_name("torl"))
SMALL = [
    "num_steps=3",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "trainer.mini_batch_samples=8",
    "eval.max_problems=8",
    "checkpoint.every_steps=1",
    "eval.temperature=0",
    "sandbox.data_libraries=false",
]
LIMIT_S = 280


def command(verb: str, runs_dir: Path, name: str, *overrides: str) -> list[str]:
    return [TORL, verb, "conf/quickstart.yaml", f"runs_dir={runs_dir}", f"name={name}", *SMALL, *overrides]


def torl(verb: str, runs_dir: Path, name: str, *overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs to the end; asserts nothing."""
    cmd = command(verb, runs_dir, name, *overrides)
    return subprocess.run(cmd, env=_environment(cmd, env), capture_output=True, text=True, timeout=LIMIT_S, check=False)


def as_shipped(conf: str, runs_dir: Path) -> Path:
    """The run of a shipped config, trained to its end on one thread for each process."""
    cmd = [TORL, "train", conf, f"runs_dir={runs_dir}"]
    done = subprocess.run(
        cmd, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs_dir / Path(conf).stem


def start(cmd: list[str], output: TextIO | int = subprocess.DEVNULL, **env: str) -> subprocess.Popen:
    """In the background."""
    return subprocess.Popen(cmd, env=_environment(cmd, env), stdout=output, stderr=output)


def _environment(cmd: list[str], env: dict[str, str]) -> dict[str, str]:
    """Whatever the command starts carries its `name=…`, for `processes_of`."""
    return {**os.environ, "TORL_TEST_RUN": next(word for word in cmd if word.startswith("name=")), **env}


def rows(run: Path, kind: str = "train") -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    parsed = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [row for row in parsed if row["kind"] == kind]


def processes_of(marker: str) -> dict[int, str]:
    """Pids of live processes that carry `marker` in their command line or environment, with their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            command_line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if state != "Z" and (marker in command_line or marker in environment):
            found[int(entry.name)] = command_line[:400]
    return found


def pid_of(marker: str, part: str) -> int:
    """The process of the run with `part` in its command line; its reaper has the same and is left out."""
    return next(pid for pid, line in processes_of(marker).items() if part in line and "reaper.py" not in line)


def wait_until_gone(marker: str, limit_s: float = 10) -> None:
    """No process of the run is left; else says which are."""
    deadline = time.monotonic() + limit_s
    while left := processes_of(marker):
        assert time.monotonic() < deadline, f"after {limit_s:g} s these still run: {left}"
        time.sleep(0.1)


def wait_until(condition, *, limit_s: float, what: str):
    """Polls what has no event to await: another program's files and processes."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {limit_s:g} s: {what}")
