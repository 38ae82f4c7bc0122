"""The whole loop with the real engines: train, record, verify, replay in other layouts, kill, resume, overlap."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file
from torl_runs import LIMIT_S, TORL, command, pid_of, processes_of, rows, start, torl, wait_until, wait_until_gone

from torl_mega.rollout.recorder import read_groups, step_path

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def temporary(tmp_path_factory):
    """Where the system's temporary files go for the runs that are given it."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="session")
def trained(runs_dir, temporary):
    """A finished run of three small steps, trainer and server taking turns. Replays of it keep all their memory all the time."""
    turns = ("cluster.turns=always", "trainer.park_weights=true")
    done = torl("train", runs_dir, "trained", *turns, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        f"done: {runs_dir / 'trained' / 'summary.json'}; look at it: torl view"
    )
    assert not list(temporary.iterdir())
    return runs_dir / "trained"


def test_a_run_leaves_what_the_design_promises(trained):
    for name in ("config.json", "metrics.jsonl", "tensorboard", "trajectories", "checkpoints", "hf", "summary.json"):
        assert (trained / name).exists(), name
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 3
    assert set(summary["eval"]) == {"before", "after"}
    assert set(summary["train"]) == {"accuracy", "code_ratio", "pass_ratio", "reward"}
    assert set(summary["wall_s"]) == {"rollout", "train", "sync", "total"}
    assert summary["weight_sync"] == {"num_syncs": 4, "num_verified": 4}
    assert summary["mismatch"]["max_abs_logprob_diff"] <= 1e-4
    assert [row["step"] for row in rows(trained)] == [0, 1, 2]


def test_every_trained_token_was_sampled(trained):
    audit = subprocess.run([TORL, "view", str(trained), "--audit"], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "48 trajectories" in audit.stdout


def test_the_exported_policy_is_the_one_that_was_served(trained):
    """hf/ in plain transformers writes, greedily, what the server wrote in the evaluation after the last sync."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained / "hf")
    model, start = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (trained / "hf", "conf/quickstart"))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    for line in (trained / "eval" / "step_00003.jsonl").read_text().splitlines():
        transcript = json.loads(line)
        ids = tokenizer.encode(f"Q: {transcript['problem']}=?\nA:", return_tensors="pt")
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert transcript["response"].startswith(tokenizer.decode(written, skip_special_tokens=True))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["hf", "checkpoints/step_00003"])
def test_eval_gives_what_the_training_gave_at_its_end(trained, runs_dir, checkpoint):
    name = f"eval_{Path(checkpoint).name}"
    done = torl("eval", runs_dir, name, f"model.path={trained / checkpoint}")
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = runs_dir / name / "eval" / "step_00000", trained / "eval" / "step_00003"
    for suffix in (".json", ".md", ".jsonl"):
        assert Path(f"{ours}{suffix}").is_file()
    assert Path(f"{ours}.md").read_text() in done.stdout
    lines = [Path(f"{at}.jsonl").read_text().splitlines() for at in (ours, theirs)]
    said = [[json.loads(line)["response"] for line in each] for each in lines]
    assert said[0] == said[1]


@pytest.mark.parametrize("cut", ["tensor=2", "pipeline=2", pytest.param("data=2", marks=pytest.mark.slow)])
def test_other_layouts_give_the_same_first_step(trained, runs_dir, cut):
    name = f"replay_{cut.replace('=', '')}"
    done = torl("train", runs_dir, name, f"rollout.replay={trained}", f"parallel.{cut}", "num_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = rows(trained)[0], rows(runs_dir / name)[0]
    for metric in ("loss", "grad_norm", "entropy"):
        assert other[metric] == pytest.approx(one[metric], rel=1e-5, abs=1e-9), metric


def test_a_killed_run_leaves_nothing_and_resumes(runs_dir, temporary):
    """SIGKILL to both side-cars, which come back, then to the launcher while it trains and samples ahead; then the same
    command finishes the run."""
    overrides = ("num_steps=500", "rollout.max_staleness=1")
    process = start(command("train", runs_dir, "killed", *overrides), TMPDIR=str(temporary))
    try:
        wait_until(lambda: len(rows(runs_dir / "killed")) >= 2, limit_s=LIMIT_S, what="two steps")
        for sidecar in ("torl_mega.sandbox.serve", "torl_mega.serving.serve"):
            os.kill(pid_of("name=killed", sidecar), signal.SIGKILL)
        seen = len(rows(runs_dir / "killed"))
        wait_until(
            lambda: len(rows(runs_dir / "killed")) >= seen + 3, limit_s=LIMIT_S, what="three steps after the kills"
        )
        logs = runs_dir / "killed" / "logs"
        for sidecar in ("sandbox_0", "server_0"):
            assert f"torl: {sidecar} was killed by SIGKILL; starting it again" in (logs / f"{sidecar}.log").read_text()
        assert list(temporary.iterdir())
        tasks = [child for child in psutil.Process(process.pid).children() if "reaper.py" in " ".join(child.cmdline())]
        assert len(tasks) == len(psutil.Process(process.pid).children()) == 3
        assert all("torl_mega.launch.task" in task.cmdline() for task in tasks)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_until_gone("name=killed")
    assert not list(temporary.iterdir())
    before = rows(runs_dir / "killed")
    steps = len(before) + 1
    done = torl("train", runs_dir, "killed", f"num_steps={steps}", "rollout.max_staleness=1")
    assert done.returncode == 0, done.stdout + done.stderr
    after = rows(runs_dir / "killed")
    assert [row["step"] for row in after] == list(range(steps))
    saved = [row for row in before if row["step"] < len(before) - 1]
    assert after[: len(saved)] == saved  # what the last checkpoint covers was not repeated
    for step in range(steps):
        groups = read_groups(step_path(runs_dir / "killed" / "trajectories", step))
        versions = {v for g in groups for t in g.trajectories for turn in t.turns for v in turn.policy_versions}
        assert versions
        assert versions <= {step - 1, step}
    assert not processes_of("name=killed")


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("killed_rank", "torl_mega.train"),
        pytest.param("killed_task", "torl_mega.launch.task rank", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_starts_again_from_the_last_checkpoint(trained, runs_dir, tmp_path, name, victim):
    """And ends with the weights of the undisturbed run whose record it replays."""
    with (tmp_path / "out").open("w") as out:
        process = start(command("train", runs_dir, name, f"rollout.replay={trained}"), out)
        wait_until(lambda: rows(runs_dir / name), limit_s=LIMIT_S, what="one step")
        os.kill(pid_of(f"name={name}", victim), signal.SIGKILL)
        assert process.wait(LIMIT_S) == 0, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert said.count("torl: a rank was killed (code 137); the ranks start again from the last checkpoint") == 1
    assert [row["step"] for row in rows(runs_dir / name)] == [0, 1, 2]
    one, other = (load_file(run / "hf" / "model.safetensors") for run in (trained, runs_dir / name))
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_ranks_that_are_killed_too_often_end_the_run(trained, tmp_path):
    """Training that cannot even start, e.g. for lack of memory, looks like this."""
    with (tmp_path / "out").open("w") as out:
        cmd = command("train", tmp_path, "hopeless", f"rollout.replay={trained}")
        process = start(cmd, out, TORL_MAX_RESTARTS="1")
        for _ in range(2):
            pid = wait_until(
                lambda: [p for p, line in processes_of("name=hopeless").items() if " -m torl_mega.train" in line],
                limit_s=60,
                what="a rank",
            )[0]
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: pid not in processes_of("name=hopeless"), limit_s=60, what="the rank's end")
        assert process.wait(60) == 86
    last = (tmp_path / "out").read_text().splitlines()[-1]
    assert last == f"torl: error: ranks were killed 2 times (last code 137); logs in {tmp_path}/hopeless/logs"
    assert not processes_of("name=hopeless")


@pytest.mark.slow
def test_a_killed_side_cars_task_starts_everything_again(runs_dir, tmp_path):
    with (tmp_path / "out").open("w") as out:
        process = start(command("train", runs_dir, "task_killed", "num_steps=40"), out)
        wait_until(lambda: rows(runs_dir / "task_killed"), limit_s=LIMIT_S, what="one step")
        os.kill(pid_of("name=task_killed", "torl_mega.launch.task server"), signal.SIGKILL)
        assert process.wait(LIMIT_S) == 0, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert "torl: a side-car's task was killed; ending the ranks" in said
    assert "the ranks start again from the last checkpoint" in said
    assert [row["step"] for row in rows(runs_dir / "task_killed")] == list(range(40))


def test_a_complete_run_is_left_alone(trained, runs_dir):
    begun = (trained / "metrics.jsonl").stat()
    done = torl("train", runs_dir, "trained")
    assert done.returncode == 0
    assert "is complete (3 steps)" in done.stdout
    assert (trained / "metrics.jsonl").stat() == begun


@pytest.mark.slow
def test_a_stopped_run_saves_and_says_85(runs_dir):
    process = start(command("train", runs_dir, "stopped", "num_steps=50", "checkpoint.every_steps=0"))
    wait_until(lambda: rows(runs_dir / "stopped"), limit_s=LIMIT_S, what="one step")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 85
    checkpoints = sorted(p.name for p in (runs_dir / "stopped" / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    assert int(checkpoints[0].removeprefix("step_")) == len(rows(runs_dir / "stopped"))
    assert not processes_of("name=stopped")


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_sampling_ahead_stays_within_the_bound(runs_dir, staleness):
    name = f"ahead_{staleness}"
    done = torl("train", runs_dir, name, f"rollout.max_staleness={staleness}", "num_steps=6")
    assert done.returncode == 0, done.stdout + done.stderr
    for step in range(6):
        groups = read_groups(step_path(runs_dir / name / "trajectories", step))
        versions = {v for g in groups for t in g.trajectories for turn in t.turns for v in turn.policy_versions}
        assert versions <= set(range(max(0, step - staleness), step + 1))
        assert staleness > 1 or versions == {max(0, step - 1)}
    assert not processes_of(f"name={name}")


def test_a_changed_recipe_is_refused(trained, runs_dir):
    done = torl("train", runs_dir, "trained", "optim.lr=0.5")
    assert done.returncode == 1
    assert "optim.lr: 0.0003 there, 0.5 here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=nowhere", "model.path = nowhere is no folder"),
        ("data.train=nowhere.parquet", "data.train = 'nowhere.parquet' is not there"),
        ("parallel.tensor=3", "does not divide the 4 attention heads"),
        ("serving.extra_args=[--no-such-flag]", "unrecognized arguments: --no-such-flag"),
        ("serving.startup_timeout_s=1", "was not ready after 1 s"),
        ("algo.clip_hgih=1", "did you mean algo.clip_high?"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, override, message):
    done = torl("train", tmp_path, "bad", override)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("torl: error: ")
    assert message in last
    assert not processes_of("name=bad")


def test_a_python_for_the_servers_that_is_not_there_is_one_line(tmp_path):
    done = torl("train", tmp_path, "bad", TORL_SGLANG_PYTHON="/nope/python")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "torl: error: server_0 could not be started: server_0: No such file or directory: /nope/python"
    )
    assert not processes_of("name=bad")


@pytest.mark.slow
def test_replayed_metrics_repeat_bit_for_bit(trained, runs_dir):
    """Training from the record twice: equal losses, norms and exported weights."""
    weights = []
    for name in ("again_1", "again_2"):
        done = torl("train", runs_dir, name, f"rollout.replay={trained}", "num_steps=2")
        assert done.returncode == 0, done.stdout + done.stderr
        weights.append(load_file(runs_dir / name / "hf" / "model.safetensors"))
    first, second = (rows(runs_dir / name) for name in ("again_1", "again_2"))
    for a, b in zip(first, second, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    assert all(np.array_equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["data=1", "tensor=2"])
def test_a_server_killed_while_turns_are_taken_comes_back_and_no_bit_of_the_policy_moves(runs_dir, tmp_path, cut):
    """The undisturbed trainer that replays the record, with all its memory all the time, ends with the same weights."""
    name = f"turns_{cut.replace('=', '')}"
    with (tmp_path / "out").open("w") as out:
        turns = ("cluster.turns=always", "trainer.park_weights=true", f"parallel.{cut}", "num_steps=8")
        process = start(command("train", runs_dir, name, *turns, "eval.every_steps=2"), out)
        for step in (1, 4):
            wait_until(lambda step=step: len(rows(runs_dir / name)) >= step, limit_s=LIMIT_S, what="a step")
            os.kill(pid_of(f"name={name}", "sglang.launch_server"), signal.SIGKILL)
        assert process.wait(LIMIT_S) == 0, (tmp_path / "out").read_text()
    assert [row["step"] for row in rows(runs_dir / name)] == list(range(8))
    done = torl(
        "train", runs_dir, f"{name}_replayed", f"rollout.replay={runs_dir / name}", f"parallel.{cut}", "num_steps=8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (load_file(runs_dir / n / "hf" / "model.safetensors") for n in (name, f"{name}_replayed"))
    assert all(np.array_equal(one[key], other[key]) for key in one)
