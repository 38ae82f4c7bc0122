"""conf/quickstart_moe.yaml as it ships: a model with experts learns, and the trainer takes the experts that the server took."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from torl_runs import TORL, as_shipped, rows

from torl_mega.rollout.recorder import read_groups, step_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_model_with_experts_learns_with_their_routes_replayed(tmp_path: Path) -> None:
    run = as_shipped("conf/quickstart_moe.yaml", tmp_path)
    first, *_, last = rows(run, "eval")
    assert first["accuracy"] < 0.3
    assert last["accuracy"] >= 0.85
    steps = rows(run)
    assert len(steps) == 30
    assert max(row["max_abs_logprob_diff"] for row in steps) <= 1e-4
    assert max(row["experts/replay_changes"] for row in steps) <= 1e-3  # fp32: near ties alone
    trajectory = read_groups(step_path(run / "trajectories", 29))[0].trajectories[0]
    assert trajectory.routes is not None
    assert trajectory.routes.shape == (len(trajectory.prompt.token_ids) + len(trajectory.response_ids), 2, 2)
    audit = subprocess.run([TORL, "view", str(run), "--audit"], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
