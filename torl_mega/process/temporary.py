"""A folder for a process tree's temporary files, which goes with its owner or, where that was killed, at the next one's start.

In each lies a file `.torl-owner`, locked by whoever made the folder and by the children that inherit the descriptor: the kernel
unlocks it with the last of them, however they end. A folder whose lock is free therefore belongs to nobody.
Contract: a folder without that file, another user's, and a link to one are never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "torl-"
OWNER = ".torl-owner"  # a name that nobody else gives a file


@contextlib.contextmanager
def temporary_folder(base: str) -> Iterator[tuple[str, int]]:
    """A new folder below `base` and the descriptor of its lock; those there that nobody owns any more are removed."""
    remove_ownerless(base)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=base, ignore_cleanup_errors=True) as folder:
        new = Path(folder, f"{OWNER}.new")
        lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.rename(new.with_name(OWNER))  # only now, so that nobody ever sees it unlocked
            yield folder, lock
        finally:
            os.close(lock)


def remove_ownerless(base: str) -> None:
    for owner in Path(base).glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError):  # owned, gone meanwhile, or not ours to open
            if owner.parent.is_symlink() or owner.parent.stat().st_uid != os.geteuid():
                continue
            lock = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)
            finally:
                os.close(lock)
