"""Jobs end in many ways; training goes on by itself and ends like an undisturbed run, bit for bit.

All runs train the quickstart's model, TP=2 over two nodes, on one recording (see recording.py), so that equal weights
are the only right answer. Servers and sandboxes take part in test_quickstart_with_engines alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from recording import make_recording

from torl_mega.config_file import load_config
from torl_mega.planner.placement import read_placement
from torl_mega.rollout.recorder import read_groups, step_path

ROOT = Path(__file__).resolve().parents[2]
CONF = "conf/clusters/quickstart.yaml"
STEPS = 6
SIZES = ["rollout.prompts_per_step=2", "rollout.group_size=4", "trainer.mini_batch_samples=8", f"num_steps={STEPS}"]
SIZES += ["checkpoint.every_steps=1", "eval.data=[]", "logging.tensorboard=false"]

pytestmark = [pytest.mark.timeout(1500)]


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    return make_recording(load_config(ROOT / CONF, SIZES), folder, num_steps=STEPS)


@pytest.fixture(scope="session")
def undisturbed(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Final weights of the same run by `torl train` on this machine, two ranks and no Slurm."""
    runs = tmp_path_factory.mktemp("local")
    code = "import sys; from torl_mega.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", CONF, *SIZES, f"rollout.replay={recording}", f"runs_dir={runs}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=600)
    return weights(runs)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    for link in (ROOT / "runs/.jobs").glob("*"):
        if link.is_symlink() and str(link.readlink()).startswith(str(folder)):
            link.unlink()


def start(slurm: Cluster, runs: Path, recording: Path, *options: str, overrides: str = "", **env: str) -> int:
    """Submits the real launch file; the job id."""
    texts = " ".join([*SIZES, f"rollout.replay={recording}", f"runs_dir={runs}", overrides])
    settings = {"TORL_OVERRIDES": texts, "OMP_NUM_THREADS": "1", **env}
    return slurm.sbatch(f"--output={runs}/%j.out", *options, "launch/quickstart.slurm", env=settings, cwd=ROOT)


def weights(runs: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(runs.glob("*/hf/*.safetensors")))


def steps_done(runs: Path) -> int:
    lines = [line for file in runs.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
    return len({json.loads(line)["step"] for line in lines if '"kind": "train"' in line})


def await_step(runs: Path, step: int, job: Callable[[], dict[str, str]], timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while steps_done(runs) < step:
        assert job()["JobState"] != "FAILED", said(runs)
        assert time.monotonic() < deadline, (
            f"{steps_done(runs)} steps after {timeout_s} s, job {job()['JobState']}: {said(runs)}"
        )
        time.sleep(0.2)


def said(runs: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(runs.glob("*.out")))


def rank_pids(runs: Path) -> dict[int, int]:
    """Rank -> pid of the rank programs of this run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if b"torl_mega.train" in command and command[1] == b"-m" and str(runs).encode() in command[3]:
                found[int(_environment(int(folder.name))["RANK"])] = int(folder.name)
    return found


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def finish(slurm: Cluster, job: int, runs: Path, undisturbed: bytes) -> None:
    record = slurm.wait(job, timeout_s=600)
    assert record["JobState"] == "COMPLETED", said(runs)
    assert weights(runs) == undisturbed


# ------------------------------------------------------------------------------------------------ the smoke


def test_a_replay_over_two_nodes_ends_like_the_local_run(
    idle: Cluster, runs: Path, recording: Path, undisturbed: bytes
) -> None:
    job = start(idle, runs, recording)
    finish(idle, job, runs, undisturbed)
    assert "preflight: 2 nodes, all well" in said(runs)
    logs = next(runs.glob("*/jobs/*/logs/0.0"))
    assert {path.name.split(".")[-2] for path in logs.glob("*.log")} == {"rank_0", "rank_1"}
    placement = json.loads((logs / "placement.json").read_text())
    assert [p["role"] for p in placement["processes"]] == ["rank", "rank"]
    assert [p["ip"] for p in placement["processes"]] == [idle.address(0), idle.address(1)]


# --------------------------------------------------------------------------------------------- the lifecycle


@pytest.mark.slow
def test_scancel_signal_saves_and_requeues(idle: Cluster, runs: Path, recording: Path, undisturbed: bytes) -> None:
    job = start(idle, runs, recording)
    await_step(runs, 2, lambda: idle.job(job))
    idle.run("scancel", "--batch", "--signal=USR1", str(job))
    finish(idle, job, runs, undisturbed)
    assert int(idle.job(job)["Restarts"]) == 1


@pytest.mark.slow
def test_a_signal_before_there_are_ranks_requeues(
    idle: Cluster, runs: Path, recording: Path, undisturbed: bytes
) -> None:
    """While the job plans and looks at its nodes."""
    job = start(idle, runs, recording)
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/jobs/*/logs/0.0/status")):
        assert time.monotonic() < deadline, said(runs)
        time.sleep(0.05)
    idle.run("scancel", "--batch", "--signal=USR1", str(job))
    finish(idle, job, runs, undisturbed)
    assert int(idle.job(job)["Restarts"]) == 1
    assert not list(runs.glob("*/jobs/*/logs/0.0/*.rank_*.log"))


@pytest.mark.slow
def test_the_time_limit_requeues(idle: Cluster, runs: Path, recording: Path, undisturbed: bytes) -> None:
    """The job needs longer than its limit, so it is warned (up to a minute early), saves, and goes on in a new start."""
    job = start(idle, runs, recording, "--time=2", "--signal=B:USR1@60")
    assert idle.job(job)["TimeLimit"] == "00:02:00"
    finish(idle, job, runs, undisturbed)


@pytest.mark.slow
def test_preemption_requeues(idle: Cluster, runs: Path, recording: Path, undisturbed: bytes) -> None:
    job = start(idle, runs, recording, "--nodes=2", "--nodelist=n0,n1")
    await_step(runs, 2, lambda: idle.job(job))
    urgent = idle.sbatch(
        "--partition=urgent", "--nodes=2", "--nodelist=n0,n1", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
    )
    idle.wait(urgent, timeout_s=120)
    finish(idle, job, runs, undisturbed)
    assert int(idle.job(job)["Restarts"]) >= 1


@pytest.mark.slow
def test_a_lost_node_requeues_on_other_nodes(idle: Cluster, runs: Path, recording: Path, undisturbed: bytes) -> None:
    job = start(idle, runs, recording)
    await_step(runs, 2, lambda: idle.job(job))
    assert idle.job(job)["NodeList"] == "n[0-1]"
    idle.lose("n1")
    finish(idle, job, runs, undisturbed)
    assert int(idle.job(job)["Restarts"]) == 1
    assert idle.job(job)["NodeList"] != "n[0-1]"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_starts_again_in_place(
    idle: Cluster, runs: Path, recording: Path, undisturbed: bytes, rank: int
) -> None:
    job = start(idle, runs, recording)
    await_step(runs, 2, lambda: idle.job(job))
    os.kill(rank_pids(runs)[rank], signal.SIGKILL)
    finish(idle, job, runs, undisturbed)
    assert "start again from the last checkpoint" in said(runs)
    assert int(idle.job(job)["Restarts"]) == 0


@pytest.mark.slow
def test_a_hung_rank_ends_with_every_ranks_stacks(idle: Cluster, runs: Path, recording: Path) -> None:
    job = start(idle, runs, recording, overrides="cluster.hang_s=90", TORL_MAX_RESTARTS="0")
    await_step(runs, 1, lambda: idle.job(job))
    os.kill(rank_pids(runs)[1], signal.SIGSTOP)
    time.sleep(1)
    record = idle.wait(job, timeout_s=400)
    assert record["ExitCode"] == "86:0", said(runs)
    logs = next(runs.glob("*/jobs/*/logs/0.0"))
    assert "no sign of life" in next(logs.glob("*.rank_0.log")).read_text()
    assert "Fatal Python error: Aborted" in next(logs.glob("*.rank_0.log")).read_text()


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_goes_on_later(
    idle: Cluster, runs: Path, recording: Path, undisturbed: bytes
) -> None:
    """Checkpoints on a small file system of their own: the job stops; with room again the same command goes on."""
    small = runs / "quickstart_slurm" / "checkpoints"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)
    try:
        filler = small / "filler"
        job = start(idle, runs, recording, overrides="checkpoint.keep_last=1")
        await_step(runs, 2, lambda: idle.job(job))
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 65536)
        record = idle.wait(job, timeout_s=300)
        assert record["JobState"] == "FAILED", said(runs)
        assert "torl: error:" in said(runs)
        assert "Traceback" not in said(runs)
        filler.unlink()
        finish(idle, start(idle, runs, recording, overrides="checkpoint.keep_last=1"), runs, undisturbed)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(idle: Cluster, runs: Path, recording: Path) -> None:
    job = start(idle, runs, recording)
    await_step(runs, 1, lambda: idle.job(job))
    idle.run("scancel", str(job))
    assert idle.wait(job, timeout_s=60)["JobState"] == "CANCELLED"
    time.sleep(2 * idle.shape.kill_wait_s)
    assert idle.job(job)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_a_resumed_run_may_have_another_number_of_nodes(idle: Cluster, runs: Path, recording: Path) -> None:
    """Half of the run on two nodes (DP=2), the rest on one; the weights differ by rounding only, the steps add up."""
    alone = "parallel.tensor=1"
    job = start(idle, runs, recording, overrides=f"{alone} num_steps=3")
    assert idle.wait(job, timeout_s=300)["JobState"] == "COMPLETED", said(runs)
    shutil.rmtree(runs / "quickstart_slurm" / "hf")
    job = start(idle, runs, recording, "--nodes=1", overrides=alone)
    assert idle.wait(job, timeout_s=300)["JobState"] == "COMPLETED", said(runs)
    assert steps_done(runs) == STEPS
    assert weights(runs)


# ----------------------------------------------------------------------------------------- with the engines


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_with_engines_survives_a_killed_server(idle: Cluster, runs: Path) -> None:
    """The whole quickstart on two nodes, TP=2 across them, a server and a sandbox on each; one server is killed."""
    job = start_engines(idle, runs, "launch/quickstart.slurm", "num_steps=30")
    await_step(runs, 3, lambda: idle.job(job), timeout_s=900)
    secret = _environment(rank_pids(runs)[0])["TORL_SECRET"]
    refused_without(secret, json.loads(next(runs.glob("*/jobs/*/logs/0.0/placement.json")).read_text()))
    os.kill(_pid(b"sglang.launch_server", b"n1"), signal.SIGKILL)
    assert idle.wait(job, timeout_s=1500)["JobState"] == "COMPLETED", said(runs)
    summary = json.loads((runs / "quickstart_slurm/summary.json").read_text())
    assert summary["eval"]["after"]["accuracy"] > 0.9
    assert summary["weight_sync"]["num_verified"] == summary["weight_sync"]["num_syncs"]
    written = [path for path in runs.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert written == []


def refused_without(secret: str, placement: dict) -> None:
    """Every server and sandbox sends us away, and no process shows the secret on its command line."""
    doors = [p for p in placement["processes"] if p["role"] != "rank"]
    assert [p["role"] for p in doors] == ["server", "sandbox"] * 2
    for door in doors:
        path = "/server_info" if door["role"] == "server" else "/metrics"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{door['ip']}:{door['port']}{path}", timeout=30)
    assert len(secret) == 64
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert secret.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_killed_side_cars_task_starts_everything_again(idle: Cluster, runs: Path) -> None:
    job = start_engines(idle, runs, "launch/quickstart.slurm", "num_steps=30")
    await_step(runs, 2, lambda: idle.job(job), timeout_s=900)
    os.kill(_pid(b"torl_mega.launch.task", b"server", b"n1"), signal.SIGKILL)
    assert idle.wait(job, timeout_s=900)["JobState"] == "COMPLETED", said(runs)
    assert "a rank was killed (code 137); the ranks start again from the last checkpoint" in said(runs)
    assert steps_done(runs) == 30


@pytest.mark.slow
def test_a_side_car_that_cannot_start_ends_the_job_with_its_line(idle: Cluster, runs: Path) -> None:
    job = start_engines(idle, runs, "launch/quickstart.slurm", "serving.extra_args=[--no-such-flag]")
    assert idle.wait(job, timeout_s=400)["ExitCode"] == "1:0", said(runs)
    assert "torl: error: server_" in said(runs)
    assert "unrecognized arguments: --no-such-flag" in said(runs)
    logs = next(runs.glob("*/jobs/*/logs/0.0"))
    assert not any("starting it again" in log.read_text() for log in logs.glob("*.log"))


@pytest.mark.slow
def test_an_evaluation_over_two_nodes(idle: Cluster, runs: Path) -> None:
    """No trainer: a server on each node, and one program that collects on the first."""
    options, env = ["--nodes=2", "--cpus-per-task=1"], {"TORL_CONF": CONF}
    job = start_engines(
        idle, runs, "launch/eval.slurm", "name=scored eval.max_problems=8 cluster.servers_per_node=1", *options, **env
    )
    assert idle.wait(job, timeout_s=600)["JobState"] == "COMPLETED", said(runs)
    assert (runs / "scored/eval/step_00000.md").read_text() in said(runs)
    placement = json.loads(next(runs.glob("*/jobs/*/logs/0.0/placement.json")).read_text())
    assert [p["role"] for p in placement["processes"]] == ["rank", "server", "sandbox", "server", "sandbox"]
    assert json.loads((runs / "scored/eval/step_00000.json").read_text())


def start_engines(slurm: Cluster, runs: Path, file: str, overrides: str, *options: str, **env: str) -> int:
    settings = {"TORL_OVERRIDES": f"runs_dir={runs} {overrides}", "OMP_NUM_THREADS": "1", **env}
    return slurm.sbatch(f"--output={runs}/%j.out", *options, file, env=settings, cwd=ROOT)


def start_7b(slurm: Cluster, runs: Path, overrides: str = "") -> int:
    """The real launch file on 2 nodes x 8 fake GPUs, with the sizes of tiny_7b.yaml."""
    conf = str(Path(__file__).with_name("tiny_7b.yaml"))
    return start_engines(slurm, runs, "launch/torl_7b.slurm", overrides, "--cpus-per-task=1", TORL_CONF=conf)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_7b_launch_file_with_all_its_ranks(idle: Cluster, runs: Path) -> None:
    """16 ranks, one CPU server per node: only sizes and the kind of GPU are overridden."""
    job = start_7b(idle, runs, "cluster.ranks_per_node=8 serving.tensor=1")
    assert idle.wait(job, timeout_s=1500)["JobState"] == "COMPLETED", said(runs)
    assert "16 ranks, 2 servers" in said(runs)
    assert steps_done(runs) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_7b_launch_file_ends_with_the_same_weights_however_they_travel(idle: Cluster, runs: Path) -> None:
    """Servers of TP 2, on both nodes beside the ranks by handles, and on a node of their own by broadcast: the same
    trajectories, every sync verified, and in the end the same bytes."""
    apart = "cluster.placement=disaggregated cluster.server_nodes=1 cluster.ranks_per_node=4"
    ended = {}
    for transport, overrides, servers in (("handles", "", 2), ("broadcast", apart, 1)):
        folder = runs / transport
        folder.mkdir()
        job = start_7b(idle, folder, overrides)
        assert idle.wait(job, timeout_s=800)["JobState"] == "COMPLETED", said(folder)
        assert f"4 ranks, {servers} servers" in said(folder)
        placement = read_placement(next(folder.glob("*/jobs/*/logs/0.0/placement.json")))
        assert [len(server.gpus) for server in placement.of("server")] == [2] * servers
        assert placement.owners == ("0,1;2,3" if transport == "handles" else "")
        log = next(folder.glob("*/jobs/*/logs/0.0/n0.rank_0.log")).read_text()
        assert f"weights travel to {servers} servers by {transport}" in log
        sync = json.loads((folder / "tiny_7b/summary.json").read_text())["weight_sync"]
        assert sync["num_verified"] == sync["num_syncs"] == 3
        sampled = [
            (t.response_ids, r.value)
            for step in range(2)
            for group in read_groups(step_path(folder / "tiny_7b/trajectories", step))
            for t, r in zip(group.trajectories, group.rewards, strict=True)
        ]
        ended[transport] = (sampled, weights(folder))
    assert len(ended["handles"][0]) == 32
    assert ended["handles"] == ended["broadcast"]
    assert len(ended["handles"][1]) > 1_000_000


def _pid(*words: bytes) -> int:
    """A process of the job whose command line has these words."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes()
            if command[1:2] == [b"-m"] and all(
                word in command or b"SLURMD_NODENAME=" + word in environment for word in words
            ):
                return int(folder.name)
    raise AssertionError(f"no process with {words} is running")
