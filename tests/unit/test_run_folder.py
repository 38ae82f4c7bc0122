"""The run on disk: resumed only with the same recipe, held by one process, metrics cut back to the resume point."""

import json
import os

import pytest

from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError, DataError
from torl_mega.launch.inputs import EVALUATED
from torl_mega.run.folder import is_complete, lock_run, open_run
from torl_mega.run.metrics import RunMetrics, read_rows, summarize


def config(tmp_path, *over):
    return load_config("conf/quickstart.yaml", [f"runs_dir={tmp_path}", *over])


def test_the_same_recipe_is_resumed_with_free_settings_changed(tmp_path):
    open_run(config(tmp_path))
    open_run(config(tmp_path, "num_steps=99", "parallel.tensor=2", "eval.every_steps=5", "serving.bucket_mb=1"))


def with_a_step(folder):
    folder.metrics.write_text('{"kind": "sync", "step": 0}\n{"kind": "train", "step": 0}\n')
    return folder


@pytest.mark.parametrize("left", ["", '{"kind": "sync", "step": 0}\n'])
def test_a_start_that_failed_before_anything_was_made_does_not_hold_its_name(tmp_path, left):
    folder = open_run(config(tmp_path))
    folder.metrics.write_text(left)
    for text in ("{", json.dumps({"config": {"gone": 1}})):
        (folder.path / "config.json").write_text(text)
        open_run(config(tmp_path, "optim.lr=0.1"))
    assert json.loads((folder.path / "config.json").read_text())["config"]["optim"]["lr"] == 0.1
    for made in (folder.checkpoints, folder.evaluations, folder.trajectories, folder.hf):
        made.mkdir()
        with pytest.raises(ConfigError, match=r"optim.lr: 0.1 there"):
            open_run(config(tmp_path))
        made.rmdir()


def test_evaluations_of_one_name_may_differ_in_their_model(tmp_path):
    open_run(config(tmp_path)).evaluations.mkdir()
    open_run(config(tmp_path, "model.path=other"), free=EVALUATED)
    with pytest.raises(ConfigError, match=r"seed: 1 there, 2 here"):
        open_run(config(tmp_path, "model.path=other", "seed=2"), free=EVALUATED)


def test_another_recipe_is_refused_by_name(tmp_path):
    with_a_step(open_run(config(tmp_path)))
    with pytest.raises(ConfigError, match=r"optim.lr: 0.0003 there, 0.1 here.*name="):
        open_run(config(tmp_path, "optim.lr=0.1"))


def test_a_run_of_an_earlier_version_goes_on_with_new_settings_at_their_default(tmp_path):
    folder = with_a_step(open_run(config(tmp_path)))
    written = json.loads((folder.path / "config.json").read_text())
    del written["config"]["rollout"]["oversample"]
    (folder.path / "config.json").write_text(json.dumps(written))
    open_run(config(tmp_path))
    with pytest.raises(ConfigError, match=r"rollout.oversample: 1.0 there, 2.0 here"):
        open_run(config(tmp_path, "rollout.oversample=2"))
    (folder.path / "config.json").write_text('{"config": {"name"')
    with pytest.raises(ConfigError, match="not the config of a run"):
        open_run(config(tmp_path))


def test_a_run_is_complete_when_its_last_step_is_summed_up_and_exported(tmp_path):
    wanted = config(tmp_path, "num_steps=3")
    folder = open_run(wanted)
    assert not is_complete(folder, wanted)
    folder.summary.write_text('{"steps": 3}')
    assert not is_complete(folder, wanted)
    folder.hf.mkdir()
    assert is_complete(folder, wanted)
    assert not is_complete(folder, config(tmp_path, "num_steps=4"))


def test_one_process_holds_a_run(tmp_path):
    folder = open_run(config(tmp_path))
    fd = lock_run(folder)
    with pytest.raises(ConfigError, match="in use by another process"):
        lock_run(folder)
    os.close(fd)
    os.close(lock_run(folder))


def test_an_unwritable_runs_dir_is_one_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ConfigError, match="cannot make"):
        open_run(load_config("conf/quickstart.yaml", [f"runs_dir={blocker}"]))


def metrics(step):
    row = {"accuracy": 0.5, "code_ratio": 0.9, "reward": 0.0, "response_length": 10, "grad_norm": 1.0, "k3": 1e-9}
    return {**row, "max_abs_logprob_diff": 1e-6 * (step + 1), "rollout_s": 2.0, "train_s": 1.0, "sync_s": 0.5}


def test_resume_drops_what_will_be_repeated_and_a_torn_last_line(tmp_path, capsys):
    log = RunMetrics(tmp_path, num_steps=9, resume_at=0)
    log.evaluation(0, {"accuracy": 0.1})
    for step in range(3):
        log.step(step, metrics(step))
    log.path.write_text(log.path.read_text() + '{"kind": "train", "st')
    again = RunMetrics(tmp_path, num_steps=9, resume_at=2)
    assert [(r["kind"], r["step"]) for r in again.rows] == [("eval", 0), ("train", 0), ("train", 1)]
    assert read_rows(again.path) == again.rows
    assert again.evaluated_steps() == {0}
    assert "pass -" in capsys.readouterr().out  # a ratio over nothing is shown as a dash


def test_a_broken_row_in_the_middle_is_named_and_nothing_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"kind": "train", "step": 0}\n{"kind": "tr\n{"kind": "train", "step": 2}\n'
    path.write_text(text)
    with pytest.raises(DataError, match=r"metrics.jsonl:2 is not a row"):
        RunMetrics(tmp_path, num_steps=9, resume_at=3)
    assert path.read_text() == text


def test_summary_is_computed_from_the_rows(tmp_path):
    log = RunMetrics(tmp_path, num_steps=2, resume_at=0)
    log.first_sync(0, {"num_servers": 1, "verify_s": 0.1})
    log.evaluation(0, {"accuracy": 0.1, "code_ratio": 0.0})
    log.step(0, {**metrics(0), "faults/sandbox_retry": 1, "sync/num_servers": 1, "sync/verify_s": 0.1})
    log.step(1, {**metrics(1), "faults/sandbox_retry": 2})
    log.evaluation(2, {"accuracy": 0.9, "code_ratio": 1.0})
    log.close()
    summary = json.loads(json.dumps(summarize(log.rows, config_hash="abc", wall_s=9.0)))
    assert summary["steps"] == 2
    assert (summary["eval"]["before"]["accuracy"], summary["eval"]["after"]["accuracy"]) == (0.1, 0.9)
    assert summary["mismatch"]["max_abs_logprob_diff"] == 2e-6
    assert summary["weight_sync"] == {"num_syncs": 2, "num_verified": 2}
    assert summary["faults"] == {"sandbox_retry": 3}
    assert summary["wall_s"] == {"rollout": 4.0, "train": 2.0, "sync": 1.0, "total": 9.0}
