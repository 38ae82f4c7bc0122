"""The ablation's arms load, and its table and plot say what runs on disk came to."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from torl_mega.config_file import load_config

ROOT = Path(__file__).resolve().parents[2]


def load():
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "tools/ablate.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablate"] = module  # where its dataclasses look themselves up
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


ablate = load()


def write_run(folder: Path, accuracies: list[float], final: float) -> None:
    folder.mkdir(parents=True)
    rows = [{"kind": "train", "step": i, "accuracy": a} for i, a in enumerate(accuracies)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "summary.json").write_text(json.dumps({"eval": {"before": {}, "after": {"accuracy": final}}}))


@pytest.mark.parametrize("arm", ablate.ARMS)
def test_every_arm_is_a_config_of_the_quickstart(arm: str) -> None:
    plain = load_config(ROOT / "conf/quickstart.yaml")
    changed = load_config(ROOT / "conf/quickstart.yaml", ablate.arms()[arm])
    assert (changed == plain) == (arm == "default")


def test_plus_is_what_its_file_says_and_evaluates_as_the_others() -> None:
    config = load_config(ROOT / "conf/quickstart.yaml", ablate.arms()["plus"])
    plus, quick = load_config(ROOT / "conf/plus.yaml"), load_config(ROOT / "conf/quickstart.yaml")
    assert config.algo == plus.algo.model_copy(update={"old_logprobs": quick.algo.old_logprobs})
    assert (config.eval, config.data.retire_above) == (quick.eval, plus.data.retire_above)


def test_table_and_plot_of_finished_runs(tmp_path: Path) -> None:
    for seed, (rise, final) in enumerate([(3, 0.9), (5, 0.94)], 1):
        write_run(tmp_path / ablate.run_name("default", seed), [0.2] * rise + [0.9] * (10 - rise), final)
        write_run(tmp_path / ablate.run_name("refill", seed), [0.5] * 10, 0.5)
    (tmp_path / ablate.run_name("RLOO", 1)).mkdir()  # was stopped
    found = {
        arm: [o for seed in (1, 2) if (o := ablate.read(tmp_path / ablate.run_name(arm, seed)))]
        for arm in ("default", "refill", "RLOO")
    }
    assert found["RLOO"] == []
    del found["RLOO"]
    lines = ablate.table(found).splitlines()
    assert lines[2] == "| default | 2 | 5.0 ± 12.7 | 0.920 ± 0.254 |  |"  # steps 4 and 6
    assert lines[3] == "| refill | 2 | 10.0 ± 0.0 (2 never) | 0.500 ± 0.000 | -0.420 |"
    ablate.plot(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_what_is_known_is_kept_apart_from_the_runs(tmp_path: Path) -> None:
    file = tmp_path / "ablation.jsonl"
    results = ablate.Results(file)
    assert results.get("default", 1) is None
    slow, fast = (ablate.Outcome(tuple(a), 0.9) for a in ([0.1, 0.9, 0.8, 0.9, 0.9], [0.9] * 5))
    results.add("refill", 1, ["a.b=1"], slow, {"torch": "2"})
    results.add("default", 1, [], fast, {})
    again = ablate.Results(file)
    assert (again.get("refill", 1), again.get("default", 1)) == (slow, fast)
    assert (again.get("refill", 1, ["a.b=1"]), again.get("refill", 1, ["a.b=2"])) == (slow, None)
    assert (slow.steps_to_target, slow.reached, fast.steps_to_target) == (2, True, 1)
    again.add("refill", 1, ["a.b=2"], fast, {})
    assert ablate.Results(file).get("refill", 1) == fast
    assert len(file.read_text().splitlines()) == 2


def test_the_page_shows_what_is_known() -> None:
    shown = ablate.table(ablate.Results(ROOT / "docs/ablation.jsonl").outcomes())
    before, after = ablate.MARKS
    assert f"{before}\n{shown}\n{after}" in (ROOT / "docs/algorithms.md").read_text()
