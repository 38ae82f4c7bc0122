"""One real Slurm cluster for all of tests/slurm; every test skips, saying why, where Slurm cannot run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Shape, cluster, why_absent


@contextlib.contextmanager
def shared_mounts(folder: Path) -> Iterator[None]:
    """What a test mounts below `folder` is seen by the nodes, which have mount namespaces of their own."""
    for options in (["--bind", str(folder)], ["--make-shared"]):
        subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """4 nodes x 8 fake H100s x 224 cores, with networks of their own where that is allowed.

    Its folder is short (unix sockets) and open (jobs of other users)."""
    reason = why_absent()
    if reason:
        pytest.skip(reason)
    base = Path(tempfile.mkdtemp(prefix="torl-slurm-", dir="/tmp"))
    base.chmod(0o755)
    try:
        with (
            shared_mounts(tmp_path_factory.getbasetemp()),
            cluster(base / "c", Shape(base_port=12000 + os.getpid() % 200 * 20)) as handle,
        ):
            yield handle
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def idle(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with no job on it, before and after the test, and every node up."""
    yield slurm
    jobs = slurm.run("squeue", "-h", "-o", "%A").split()
    if jobs:
        slurm.run("scancel", *jobs)
    for i in range(slurm.shape.nodes):
        if f"slurmd.n{i}" not in slurm.processes:
            slurm.start_slurmd(f"n{i}")
    slurm.wait_idle(60)
