"""What a run ran on: packages, Python and chip, in `versions.json`. Contract: a record is added only where it differs from the
last one, so that a run that went on elsewhere shows it; nothing in it names a machine or a time."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from torl_mega import __version__
from torl_mega.run.files import write_json

PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang", "transformers", "numpy", "triton")


def record_versions(folder: Path, *, from_step: int) -> None:
    """Adds what this process runs on to `folder/versions.json`."""
    path = folder / "versions.json"
    try:
        before = [record for record in json.loads(path.read_text()) if record["from_step"] <= from_step]
    except (OSError, ValueError, KeyError, TypeError):
        before = []  # the first process of the run, or a damaged file
    mine = versions()
    if not before or {**before[-1], "from_step": 0} != {**mine, "from_step": 0}:
        write_json(path, [*before, {"from_step": from_step, **mine}])


def versions() -> dict[str, Any]:
    found = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    return {"torl-mega": __version__, "python": platform.python_version(), **found, "chip": chip()}


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def chip() -> str:
    """The GPUs that this process sees, or the CPU."""
    torch = sys.modules.get("torch")  # a process without it drives no GPU
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} × {models[0]}" if models else platform.machine()
