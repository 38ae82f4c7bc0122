"""What happens before anything is started: sbatch takes the launch files, and wrong input costs no GPU time."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from cluster import MARK, Cluster, why_absent

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted(ROOT.glob("launch/*.slurm"))


def submit(slurm: Cluster, *arguments: str, **env: str) -> tuple[int, str]:
    """launch/submit.sh: exit code and everything it said."""
    done = subprocess.run(
        ["launch/submit.sh", *arguments], env={**slurm.env, "OMP_NUM_THREADS": "1", **env}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize("file", LAUNCH, ids=lambda path: path.stem)
def test_sbatch_accepts_every_launch_file(slurm: Cluster, file: Path) -> None:
    assert "to start at" in slurm.run("sbatch", "--test-only", str(file), cwd=ROOT)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--nodes=5", "Requested node configuration is not available"),
        ("--gpus-per-node=9", "Requested node configuration is not available"),
        ("--gpus-per-node=a100:8", "Requested node configuration is not available"),
        ("--cpus-per-task=300", "Requested node configuration is not available"),
        ("--mem=2T", "Requested node configuration is not available"),
        ("--constraint=b200", "Invalid feature specification"),
        ("--partition=nowhere", "Invalid partition name"),
        ("--time=tomorrow", "Invalid"),
    ],
)
def test_sbatch_refuses_what_the_cluster_has_not(slurm: Cluster, option: str, reason: str) -> None:
    out = slurm.run("sbatch", "--test-only", option, "launch/torl_7b.slurm", check=False, cwd=ROOT)
    assert reason in out
    assert "to start at" not in out


QUICK = "launch/quickstart.slurm"

# (arguments of launch/submit.sh, environment, what the one line says)
WRONG: list[tuple[list[str], dict[str, str], str]] = [
    ([QUICK, "--nodes=9"], {}, "sbatch refuses"),
    ([QUICK, "--partition=nowhere"], {}, "Invalid partition name specified"),
    (["launch/none.slurm"], {}, "is not readable"),
    (["launch/common.sh"], {}, "is not a launch file"),
    (["--chain", "many", QUICK], {}, "expected a number of jobs"),
    ([QUICK], {"TORL_CONF": "conf/none.yaml"}, "conf/none.yaml is not readable"),
    ([QUICK], {"TORL_HOME": "/nowhere"}, "TORL_HOME = /nowhere is no folder"),
    ([QUICK], {"TORL_HOME": "/usr"}, "holds no torl_mega"),
    ([QUICK], {"TORL_PYTHON": "/nowhere/python"}, "/nowhere/python is not there"),
    ([QUICK], {"TORL_IMAGE": "/images/none.sqsh"}, "TORL_IMAGE = /images/none.sqsh is not readable"),
    ([QUICK], {"TORL_CONTAINER": "pyxis"}, "needs TORL_IMAGE"),
    ([QUICK], {"TORL_IMAGE": "nvcr.io#nvidia/pytorch", "TORL_CONTAINER": "podman"}, "TORL_CONTAINER = podman is not known"),
    ([QUICK], {"TORL_IMAGE": "nvcr.io#x", "TORL_MOUNTS": "/nowhere:/data"}, "TORL_MOUNTS names /nowhere"),
    ([QUICK], {"TORL_REQUIRED": "SBATCH_ACCOUNT"}, "SBATCH_ACCOUNT is not set"),
    ([QUICK], {"TORL_MAX_RESTARTS": "often"}, "TORL_MAX_RESTARTS = often is not a number"),
    ([QUICK], {"TORL_OVERRIDES": "rolout.group_size=4"}, "did you mean"),
    ([QUICK], {"TORL_OVERRIDES": "num_steps=none"}, "num_steps"),
    ([QUICK], {"TORL_OVERRIDES": "runs_dir=/proc/none"}, "runs_dir = '/proc/none'"),
    ([QUICK], {"TORL_OVERRIDES": "runs_dir={runs} parallel.tensor=3"}, "parallel.tensor = 3 does not divide"),
    ([QUICK], {"TORL_OVERRIDES": "runs_dir={runs} model.path=models/none"}, "models/none"),
    (["launch/torl_7b.slurm"], {"TORL_OVERRIDES": "runs_dir={runs} serving.mem_fraction=0.9"}, "does not fit"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "env", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_input_is_one_clear_line_and_no_job(
    slurm: Cluster, arguments: list[str], env: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    code, out = submit(slurm, *arguments, **{k: v.replace("{runs}", f"{tmp_path}/runs") for k, v in env.items()})
    assert code != 0, out
    assert message in out
    assert any(message in line and ("error:" in line or line.startswith("NO:")) for line in out.splitlines()), out
    assert "Traceback" not in out
    assert slurm.run("squeue", "-h").strip() == ""


def test_what_was_submitted_is_frozen(slurm: Cluster, tmp_path: Path) -> None:
    """The job runs the code and config of its submission; --chain queues jobs that wait for each other."""
    code, out = submit(
        slurm,
        "--chain",
        "2",
        QUICK,
        "--hold",
        f"--output={tmp_path}/%j.out",
        TORL_OVERRIDES=f"runs_dir={tmp_path}/runs",
    )
    assert code == 0, out
    frozen = next((tmp_path / "runs/quickstart_slurm/jobs").glob("submitted.*"))
    assert (frozen / "torl_mega/train.py").read_bytes() == (ROOT / "torl_mega/train.py").read_bytes()
    assert (frozen / "config.yaml").exists()
    jobs = slurm.run("squeue", "-h", "-o", "%A").split()
    assert len(jobs) == 2
    record = slurm.job(int(jobs[0]))
    assert "singleton" in record["Dependency"]
    slurm.run("scancel", *jobs)
    shutil.rmtree(ROOT / "runs/.jobs" / frozen.name, ignore_errors=True)
    (ROOT / "runs/.jobs" / frozen.name).unlink(missing_ok=True)


def test_the_cluster_leaves_nothing_behind(tmp_path: Path) -> None:
    """Up and down again beside the session's cluster: hosts, processes, ports and files as before."""
    from cluster import Shape, cluster

    reason = why_absent()
    if reason:
        pytest.skip(reason)
    shape = Shape(nodes=1, gpus=1, base_port=17500)
    before = Path("/etc/hosts").read_text().count(MARK)
    root = Path(f"/tmp/torl-slurm-{os.getpid()}-twice")
    with cluster(root, shape) as second:
        own = "n0" if second.own_networks else socket.gethostname().split(".")[0]
        assert second.run("srun", "hostname").strip() == own
        pids = [process.pid for process in second.processes.values()]
    assert not root.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert Path("/etc/hosts").read_text().count(MARK) == before
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=False).stdout
    assert str(shape.base_port) not in links
    assert not [*Path("/etc/netns").glob(f"*{shape.base_port}*"), *Path("/run/netns").glob(f"*{shape.base_port}*")]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", shape.base_port))
