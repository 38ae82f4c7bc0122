"""Killed at ten moments that a seed draws, and started again each time: the run ends like one that was left alone.

The servers outlive the trainer, as on a cluster: each start finds them as the last one was cut off.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file
from torl_runs import LIMIT_S, TORL, command, processes_of, rows, start, torl, wait_until, wait_until_gone

from torl_mega.data import arithmetic
from torl_mega.rollout.recorder import read_rows, step_path
from torl_mega.serving.sglang_server import wait_ready

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_STEPS, NUM_KILLS = 14, 10
EXACT = ["serving.deterministic=true", "sandbox.deterministic_random=true"]
NO_EVAL = "eval.data=[]"  # so that the kills fall into steps, syncs and saves
PER_STEP, GROUP = 4, 4


@pytest.fixture(scope="module")
def server(start_server):
    """`server(override, ...)` -> the override that names a server started so, shared by the tests that ask for the same."""
    urls = {}

    def get(*overrides):
        if overrides not in urls:
            live = start_server("conf/quickstart.yaml", *overrides)
            asyncio.run(wait_ready(live.url, 280, process=live.sidecar, log_path=live.log))
            urls[overrides] = live.url
        return f"serving.urls=[{urls[overrides]}]"

    return get


def train(runs_dir, name, *overrides):
    done = torl("train", runs_dir, name, f"num_steps={NUM_STEPS}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs_dir / name


def trace_of(run):
    path = run / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def kill_once(runs_dir, name, rng, *overrides):
    """Starts the run and ends it by SIGKILL, all of it or one rank alone, up to 2 s after its start or its first new row.

    Each start thus gets a little further, and the kills fall into every part of a step: sampling, training, sync, save.
    """
    run, marker, new_rows = runs_dir / name, f"name={name}", rng.randint(0, 1)
    before, trace = len(rows(run)), trace_of(run)
    cmd = command("train", runs_dir, name, f"num_steps={NUM_STEPS}", *overrides)
    process = start(cmd, TORL_MAX_RESTARTS="0")
    try:
        wait_until(lambda: trace_of(run) != trace or process.poll() is not None, limit_s=LIMIT_S, what="a sign of work")
        wait_until(
            lambda: len(rows(run)) >= before + new_rows or process.poll() is not None, limit_s=LIMIT_S, what="new rows"
        )
        try:
            process.wait(rng.uniform(0, 2))
        except subprocess.TimeoutExpired:
            ranks = [pid for pid, line in processes_of(marker).items() if "torl_mega.train" in line]
            os.kill(rng.choice([process.pid, *ranks]), signal.SIGKILL)
            process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    wait_until_gone(marker)


def timeless(run):
    """The training rows without what a clock decides."""
    clocks = ("_s", "sync/", "faults/")
    return [
        {k: v for k, v in row.items() if not k.endswith(clocks[0]) and not k.startswith(clocks[1:])}
        for row in rows(run)
    ]


def trajectories(run):
    found = []
    for step in range(NUM_STEPS):
        for row in read_rows(step_path(run / "trajectories", step)):
            for turn in row["turns"]:
                if turn["tool_call"]:
                    turn["tool_call"].pop("wall_s")
            row.pop("times")
            found.append(row)
    return found


@pytest.mark.parametrize("staleness", [0, 1])
def test_with_the_exact_generator_every_bit_is_the_same(server, tmp_path, staleness):
    overrides = [*EXACT, NO_EVAL, server(*EXACT), f"rollout.max_staleness={staleness}"]
    calm, rng = train(tmp_path, "calm", *overrides), random.Random(20 + staleness)
    for _ in range(NUM_KILLS):
        kill_once(tmp_path, "killed", rng, *overrides)
    killed = train(tmp_path, "killed", *overrides)
    assert timeless(killed) == timeless(calm)
    assert trajectories(killed) == trajectories(calm)
    one, other = (load_file(run / "hf" / "model.safetensors") for run in (calm, killed))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("staleness", [0, 2])
def test_with_the_ordinary_generator_no_trajectory_is_lost_or_repeated(server, tmp_path, staleness):
    overrides, rng = [NO_EVAL, server(), f"rollout.max_staleness={staleness}"], random.Random(30 + staleness)
    for _ in range(NUM_KILLS):
        kill_once(tmp_path, "killed", rng, *overrides)
    run = train(tmp_path, "killed", *overrides)
    assert [row["step"] for row in rows(run)] == list(range(NUM_STEPS))
    expected = [p.problem_id for p in itertools.islice(arithmetic.problems(1), NUM_STEPS * PER_STEP)]
    seen = [(row["problem_id"], row["sample_index"]) for row in trajectories(run)]
    assert seen == [(problem, index) for problem in expected for index in range(GROUP)]
    for step in range(NUM_STEPS):
        versions = {
            version
            for row in read_rows(step_path(run / "trajectories", step))
            for turn in row["turns"]
            for version in turn["policy_versions"]
        }
        assert versions <= set(range(max(0, step - staleness), step + 1)), step
    audit = subprocess.run([TORL, "view", str(run), "--audit", "--json"], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert json.loads(audit.stdout)
