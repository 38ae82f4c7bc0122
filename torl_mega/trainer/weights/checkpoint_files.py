"""The folder of a checkpoint: complete or not there, with size and checksum of every file.

    step_00010/manifest.json   {format, content, model, hf_config, files: {name: {size, crc32}}}; written last

Contract: a checkpoint is built in `.step_00010.tmp`, synced to disk and renamed, so a folder of the final name is
complete; a crash in the middle of saving never harms the last good one. The ranks share the checksumming.
Limits: needs a file system that all ranks share.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torl_mega.errors import CheckpointError
from torl_mega.layout import ModelShape
from torl_mega.run.files import fsync, replace_folder
from torl_mega.trainer import parallel

_STEP = re.compile(r"step_(\d+)")
MANIFEST, EXTRA = "manifest.json", "extra.json"
_COMMON_BYTES = 1 << 18  # Megatron's common.pt of 0.16.1 has 20 kB


def latest(root: Path) -> Path | None:
    """The complete checkpoint with the highest step below `root`, or None."""
    found = complete(root)
    return found[-1] if found else None


def complete(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest step first."""
    if not root.is_dir():
        return []
    named = [(int(m[1]), p) for p in root.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / MANIFEST).is_file()]
    return [p for _, p in sorted(named)]


def as_json(extra: Mapping[str, Any]) -> str:
    """`extra` as JSON. Raises CheckpointError."""
    try:
        return json.dumps(dict(extra))
    except TypeError as exc:
        raise CheckpointError(f"what the loop wants to keep is not JSON: {exc}") from None


def prepare(temporary: Path) -> None:
    """Makes an empty folder to write to. Called on rank 0. Raises OSError.

    Megatron 0.16.1 writes what all ranks have in common on rank 0 while the others wait for more, so a disk without room
    for that is refused here."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    trial = temporary / "trial"
    trial.write_bytes(bytes(_COMMON_BYTES))
    trial.unlink()


def publish(temporary: Path, path: Path, extra: str, record: Mapping[str, Any], keep_last: int | None) -> None:
    """Collective: checksums, syncs to disk, renames, and drops all but the newest `keep_last` steps (None keeps all)."""
    parallel.share(lambda: (temporary / EXTRA).write_text(extra))
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    mine = {str(p.relative_to(temporary)): fingerprint(p) for p in files[parallel.rank() :: parallel.world_size()]}
    error: OSError | None = None
    try:
        for name in mine:
            fsync(temporary / name)
    except OSError as exc:
        error = exc
    parallel.raise_together(error)
    listing = {name: found for part in parallel.gather(mine) for name, found in part.items()}
    parallel.share(lambda: _finish(temporary, path, {**record, "files": listing}, keep_last))


def _finish(temporary: Path, path: Path, manifest: Mapping[str, Any], keep_last: int | None) -> None:
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    replace_folder(temporary, path)
    if keep_last is not None:
        for old in complete(path.parent)[:-keep_last]:
            if old != path:
                shutil.rmtree(old, ignore_errors=True)


def record_of(shape: ModelShape, hf_config: Mapping[str, Any], content: str) -> dict[str, Any]:
    """The head of a manifest; `content` is `training` or `weights`."""
    return {"format": 1, "content": content, "model": _identity(shape), "hf_config": dict(hf_config)}


def _identity(shape: ModelShape) -> dict[str, Any]:
    """What must agree between a checkpoint and the model it is loaded into."""
    record = asdict(shape)
    names = ("architecture", "num_layers", "hidden", "num_heads", "num_kv_groups", "head_dim", "ffn", "vocab", "tied")
    return {name: record[name] for name in names} | ({"experts": record["experts"]} if shape.experts else {})


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads manifest.json. Raises CheckpointError when the folder is missing or not complete, or its manifest is damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for key in ("files", "model", "hf_config"):
            dict(manifest[key])
        str(manifest["content"])
    except OSError:
        raise CheckpointError(
            f"{path}: no {MANIFEST}, so the checkpoint is not complete; take another step_* folder"
        ) from None
    except (ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {exc!r}; take another step_* folder") from None
    return manifest


def check_model(path: Path, manifest: Mapping[str, Any], shape: ModelShape) -> None:
    """Raises CheckpointError naming what differs between the checkpoint's model and this one."""
    theirs = manifest["model"]
    differs = [f"{k} {theirs.get(k)} (model.path: {v})" for k, v in _identity(shape).items() if theirs.get(k) != v]
    if differs:
        raise CheckpointError(f"{path} belongs to another model: {', '.join(differs)}; set model.path or name to match")


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Collective: compares every file with the manifest; raises CheckpointError on all ranks."""
    error: BaseException | None = None
    for name, wanted in sorted(manifest["files"].items())[parallel.rank() :: parallel.world_size()]:
        found = fingerprint(path / name)
        if found != wanted:
            state = "is missing" if found is None else f"has {found['size']} bytes, crc {found['crc32']}"
            error = CheckpointError(
                f"{path / name} {state}; the manifest says {wanted['size']} bytes, crc {wanted['crc32']}: "
                "the checkpoint is damaged, remove its folder to resume from the one before"
            )
            break
    parallel.raise_together(error)


def fingerprint(file: Path) -> dict[str, int] | None:
    """Size and CRC-32, read in pieces; None when the file is not there."""
    crc = size = 0
    try:
        with file.open("rb") as handle:
            while piece := handle.read(1 << 22):
                crc = zlib.crc32(piece, crc)
                size += len(piece)
    except OSError:
        return None
    return {"size": size, "crc32": crc}
