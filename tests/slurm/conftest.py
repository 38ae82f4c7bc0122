"""One real Slurm cluster for all of tests/slurm; every test skips, saying why, where Slurm cannot run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Shape, cluster, why_absent


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """4 nodes x 8 fake H100s x 224 cores. Its folder is short (unix sockets) and open (jobs of other users)."""
    reason = why_absent()
    if reason:
        pytest.skip(reason)
    base = Path(tempfile.mkdtemp(prefix="torl-slurm-", dir="/tmp"))
    base.chmod(0o755)
    try:
        with cluster(base / "c", Shape(base_port=12000 + os.getpid() % 200 * 20)) as handle:
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
