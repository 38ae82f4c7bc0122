"""Atomic writes: a file or folder of its final name is complete, at every moment and after a crash.

    temporary file beside the target ─► content ─► fsync ─► rename over the target ─► fsync of the folder

Contract: a reader, or a process that starts after a kill or a power cut, finds the old content or the new one, never a part.
What a killed writer leaves behind is `.<name>.tmp`, which the next write replaces. One writer at a time per target.
Raises OSError when the disk refuses; the caller knows what the file is for and says so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes `path`'s place when the block ends without an error. Makes missing folders."""
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise OSError(errno.EINVAL, "not a regular file, nor a place for one", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """UTF-8; a lone surrogate, which a model's output can hold, is written as its escape."""
    with replacing(path) as out:
        out.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Indented, for people."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def temporary_for(path: Path) -> Path:
    """Where `path` is built before it is renamed: beside it, so that both lie on one file system."""
    return path.with_name(f".{path.name}.tmp")


def replace_folder(temporary: Path, target: Path) -> None:
    """Syncs every file of `temporary` to disk and puts it in `target`'s place; a crash leaves the old folder or the new one
    (between the two renames the old one lies at `.<name>.old`)."""
    for file in temporary.rglob("*"):
        fsync(file)
    fsync(temporary)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
