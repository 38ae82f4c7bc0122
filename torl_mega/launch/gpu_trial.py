"""`torl doctor --gpu`: what only a GPU shows, in about a minute and before a job has begun.

    trainer's Python ──handle──► SGLang's Python      the bucket of a colocated sync      (serving/trial.py)
                     ──NCCL────► SGLang's Python      the group of a disaggregated one
    trainer's Python ──► one Transformer Engine layer per precision profile               (trainer/precision_trial.py)

On a machine without a GPU the same programs run by value and over gloo, and the finding says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torl_mega.config import Config
from torl_mega.launch.checks import Check
from torl_mega.launch.commands import device_number, sglang_python
from torl_mega.launch.gpu_env import gpu_environment
from torl_mega.launch.place import nvidia_smi
from torl_mega.process.start import free_port, tail
from torl_mega.process.start import start as start_process

LIMIT_S = 180.0  # a cold file system under two environments; it takes 30 s where they are warm


def trial(config: Config | None) -> Iterator[Check]:
    """The findings. `config`: whose precision profile and cache folder; None tries what needs no FP8."""
    gpus = [device_number(n) for n in range(len(nvidia_smi("index")))]
    base = {**os.environ, **(gpu_environment(config.runs_dir if config else "runs", os.environ) if gpus else {})}
    with tempfile.TemporaryDirectory(prefix="torl-trial-") as folder:
        yield from _way_of_the_weights(gpus, base, Path(folder))
        if gpus:
            profiles = dict.fromkeys(("default", config.trainer.precision if config else "default"))
            env = {**base, "CUDA_VISIBLE_DEVICES": gpus[0]}
            command = [sys.executable, "-m", "torl_mega.trainer.precision_trial", *profiles]
            yield from _run({"trainer": (command, env)}, [f"linear {p}" for p in profiles], Path(folder))


def _way_of_the_weights(gpus: Sequence[str], base: Mapping[str, str], folder: Path) -> Iterator[Check]:
    device, num_ranks = ("cuda", 2 if len(gpus) > 1 else 1) if gpus else ("cpu", 2)
    # the server counts its GPUs otherwise than the trainer does, as beside other servers
    seen = {"trainer": gpus[:1], "server": [*gpus[1:2], *gpus[:1]]}
    pythons, port = {"trainer": sys.executable, "server": sglang_python()}, str(free_port())
    sides = {
        side: (
            [python, "-m", "torl_mega.serving.trial", side, port, device, str(num_ranks)],
            {**base, "CUDA_VISIBLE_DEVICES": ",".join(seen[side])},
        )
        for side, python in pythons.items()
    }
    yield from _run(sides, ["handle", "group"], folder)


def _run(sides: Mapping[str, tuple[list[str], dict[str, str]]], names: Sequence[str], folder: Path) -> Iterator[Check]:
    """Runs the programs side by side; a finding for each of `names`, from every side together."""
    deadline = time.monotonic() + LIMIT_S
    with ExitStack() as stack:
        running = {
            side: stack.enter_context(start_process(cmd, name=side, log_path=folder / f"{side}.log", env=env))
            for side, (cmd, env) in sides.items()
        }
        late = []
        for side, process in running.items():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(side)
    said = {side: _findings(folder / f"{side}.log") for side in sides}
    for name in names:
        found = {side: lines.get(name) for side, lines in said.items()}
        missing = {side for side, line in found.items() if line is None}
        details = [f"{side}: {line['detail']}" for side, line in found.items() if line is not None]
        for side in missing:
            why = f"not done after {LIMIT_S:.0f} s" if side in late else "ended before it"
            last = tail(folder / f"{side}.log", 1).strip()
            details.append(f"{side}: {why}{f' ({last[:300]})' if last else ''}")
        well = not missing and all(line is not None and line["ok"] for line in found.values())
        yield Check(f"gpu {name}", "ok" if well else "fail", "; ".join(details))


def _findings(log: Path) -> dict[str, dict[str, object]]:
    found = {}
    for text in log.read_text(errors="replace").splitlines():
        if text.startswith("{"):
            try:
                line = json.loads(text)
            except ValueError:
                continue  # another library's
            found[line.get("name")] = line
    return found
