"""conf/quickstart_tools.yaml as it ships: which tool answers which question is learned, from the reward alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from torl_runs import TORL, rows

from torl_mega.rollout.recorder import read_groups, step_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BELONGS = {"sums": "python", "facts": "search"}


def test_each_tool_is_used_where_it_belongs(tmp_path: Path) -> None:
    command = [TORL, "train", "conf/quickstart_tools.yaml", f"runs_dir={tmp_path}"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "quickstart_tools"
    first, *_, last = rows(run, "eval")
    assert first["accuracy"] < 0.5
    assert last["accuracy"] >= 0.9
    step = max(row["step"] for row in rows(run))
    right = total = 0
    for group in read_groups(step_path(run / "trajectories", step)):
        for t in group.trajectories:
            total += 1
            right += bool(t.tool_calls) and t.tool_calls[0].tool == BELONGS[group.prompt.problem.source]
    assert right >= 0.9 * total
    audit = subprocess.run([TORL, "view", str(run), "--audit"], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
