"""Thirty steps of the quickstart while something kills servers, sandbox, graders and the collector: it learns all the same."""

import json
import os
import random
import signal
import subprocess
import threading

import psutil
import pytest
from torl_runs import TORL, processes_of, rows, start

from torl_mega.rollout.recorder import read_rows, step_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

NUM_STEPS, PROMPTS, GROUP = 30, 16, 16
EVERY_S = (4, 12)  # between two kills
KINDS = {
    "server": lambda line: "sglang::scheduler" in line or "sglang.launch_server" in line,
    "server side-car": lambda line: "torl_mega.serving.serve" in line,
    "sandbox": lambda line: "torl_mega.sandbox.serve" in line,
    "zygote": lambda line: "-s -P -B -c" in line,
    "grader": lambda line: "torl_mega.reward.grader_process" in line,
    "collector or checkpoint helper": lambda line: "spawn_main" in line,
}


class Chaos(threading.Thread):
    """Kills one process of a kind at a time, the kinds in turns, as long as the run is alive."""

    def __init__(self, run: subprocess.Popen, seed: int) -> None:
        super().__init__(daemon=True)
        self.run_process, self.rng, self.killed, self.over = run, random.Random(seed), [], threading.Event()

    def run(self) -> None:
        kinds: list[str] = []
        while not self.over.wait(self.rng.uniform(*EVERY_S)):
            kinds = kinds or self.rng.sample(list(KINDS), len(KINDS))
            kind = kinds.pop()
            victims = [p for p in self._tree() if KINDS[kind](self._line(p))]
            if victims:
                self.rng.choice(victims).send_signal(signal.SIGKILL)
                self.killed.append(kind)

    def _tree(self) -> list[psutil.Process]:
        """Without the reapers, which carry the command line of what they guard."""
        try:
            tree = psutil.Process(self.run_process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [p for p in tree if "reaper.py" not in self._line(p)]

    @staticmethod
    def _line(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return ""


def test_a_run_full_of_faults_learns_as_well(tmp_path):
    log = (tmp_path / "log").open("w")
    cmd = [TORL, "train", "conf/quickstart.yaml", f"runs_dir={tmp_path}", "name=chaos", "rollout.max_staleness=1"]
    run = start([*cmd, "serving.num_servers=2", "guards.max_fault_rate=0.5"], log)
    chaos = Chaos(run, seed=5)
    try:
        while not rows(tmp_path / "chaos") and run.poll() is None:
            chaos.over.wait(0.5)
        chaos.start()
        assert run.wait(timeout=2700) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        chaos.over.set()
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
        run.wait()
    chaos.join()
    print(f"{len(chaos.killed)} kills: { {kind: chaos.killed.count(kind) for kind in KINDS} }")
    assert set(chaos.killed) == set(KINDS)
    assert not processes_of("name=chaos")

    folder = tmp_path / "chaos"
    assert [row["step"] for row in rows(folder)] == list(range(NUM_STEPS))
    for step in range(NUM_STEPS):
        seen = [(row["problem_id"], row["sample_index"]) for row in read_rows(step_path(folder / "trajectories", step))]
        assert len(seen) == len(set(seen)) == PROMPTS * GROUP, step
    audit = subprocess.run([TORL, "view", str(folder), "--audit"], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    summary = json.loads((folder / "summary.json").read_text())
    print(summary["eval"]["after"], summary["faults"])
    assert summary["eval"]["after"]["accuracy"] >= 0.92  # 0.97 without faults
    for fault in ("server_down", "sandbox_resent", "grader_restarted", "collector_restarted"):
        assert summary["faults"].get(fault), (fault, summary["faults"])
