"""conf/quickstart_tools.yaml as it ships: which tool answers which question is learned, from the reward alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from torl_runs import TORL, as_shipped, rows

from torl_mega.rollout.recorder import read_groups, step_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BELONGS = {"sums": "python", "facts": "search"}


def test_each_tool_is_used_where_it_belongs(tmp_path: Path) -> None:
    run = as_shipped("conf/quickstart_tools.yaml", tmp_path)
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
