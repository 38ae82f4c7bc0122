"""`torl train --dry-run`: what would stop a run is said, nothing is started and nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TORL = str(Path(sys.executable).with_name("torl"))
ROOT = Path(__file__).parents[2]


def dry(runs: Path, *overrides: str) -> tuple[int, str]:
    command = [TORL, "train", "conf/quickstart.yaml", "--dry-run", f"runs_dir={runs}", *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert list(runs.iterdir()) == []
    return done.returncode, done.stdout + done.stderr


def test_what_would_run_passes(tmp_path: Path) -> None:
    code, said = dry(tmp_path)
    assert code == 0, said
    assert said.startswith("quickstart: 1 rank(s), 1 server(s), a sandbox; on CPU\n")
    code, said = dry(tmp_path, "reward.function=own_reward:short_and_right")
    assert code == 0, said
    assert "own_reward:short_and_right is there" in said


def test_golds_that_nobody_can_match_stop_it(tmp_path: Path) -> None:
    data = tmp_path.parent / "prose.jsonl"
    prose = "See the figure above, in which the two triangles are drawn side by side and share one edge"
    data.write_text("".join(json.dumps({"problem": f"{n}+1", "answer": prose}) + "\n" for n in range(9)))
    code, said = dry(tmp_path, f"data.train={data}")
    assert code == 1
    assert "9 of 9 gold answers (100.0%) cannot be read by the grader" in " ".join(said.split())
    assert "data.max_unreadable_golds" in said


def test_a_chat_template_in_letters_and_a_missing_function_stop_it(tmp_path: Path) -> None:
    code, said = dry(tmp_path, "data.template=<|im_start|>user {problem}")
    assert code == 1
    assert "a special token of the tokenizer" in said
    code, said = dry(tmp_path, "reward.function=own_reward:nothing")
    assert code == 1
    assert said.startswith("torl: error: reward.function = own_reward:nothing: own_reward has no nothing")
