"""Starts a script on this machine, by torchrun or alone, and brings its output home."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEXT = ROOT / "build/mcore-next"  # megatron-core 0.19.2, made by `make mcore-next`


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(ranks: int, script: Path, *args: str | Path, next_megatron: bool = False, timeout_s: float = 240.0) -> str:
    """Run `script` on `ranks` ranks; returns its output, raises AssertionError with its tail when it fails."""
    starter = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    starter += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return run_python(*starter, script, *args, next_megatron=next_megatron, timeout_s=timeout_s)


def run_python(
    *args: str | Path, next_megatron: bool = False, also: Sequence[Path] = (), timeout_s: float = 240.0
) -> str:
    """`python ARGS` with one thread per process, folders of `also` on its path; output and errors as `torchrun`."""
    path = [*map(str, also), *([str(NEXT)] if next_megatron else [])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    process = subprocess.Popen(
        [sys.executable, *map(str, args)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    what = " ".join(Path(a).name for a in args if str(a).endswith(".py"))
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"{what} took more than {timeout_s} s:\n{output[-4000:]}") from None
    trace = output[max(output.find("Traceback") - 200, 0) :]
    assert process.returncode == 0, f"{what} failed:\n{trace[:6000]}"
    return output
