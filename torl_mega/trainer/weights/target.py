"""May a converter write here? `--out` replaces an earlier result of these tools and nothing else.

What counts as one: a folder of `save_weights` with the files of its manifest, or of `write_hf` with weight files that bear
its mark; a file more, and the folder is somebody's.
"""

from __future__ import annotations

import os
from pathlib import Path

from torl_mega.errors import CheckpointError, ConfigError
from torl_mega.trainer.weights.checkpoint_files import MANIFEST, read_manifest
from torl_mega.trainer.weights.hf_io import is_written_here


def check_target(out: Path, source: Path) -> None:
    """Raises ConfigError, before anything is touched, when `out` is or holds `source` or what these tools did not write."""
    here, origin = out.resolve(), source.resolve()
    if here == origin or here in origin.parents:
        raise ConfigError(f"--out {out} is or holds the source {source}; name a folder of its own")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not _is_earlier_result(out)):
        raise ConfigError(
            f"--out {out} is there and not an earlier result of these tools alone; remove it or name another folder"
        )


def _is_earlier_result(folder: Path) -> bool:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return is_written_here(folder, files)
    return manifest["content"] == "weights" and files <= {MANIFEST, *manifest["files"]}
