"""Scratch folders where there is no private tmpfs (tiers B and C): made, measured and removed by the zygote.

A snippet may leave any tree behind: thousands of levels deep, folders of mode 000, links, FIFOs. Removal never recurses
and never follows a link: each folder is first moved up to the base, so that every step handles one flat folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
removers: set[int] = set()  # pids of forked helpers that remove large trees


class Base:
    """One folder per zygote, with one short-lived folder per snippet in it."""

    def __init__(self, parent: str) -> None:
        self.path = tempfile.mkdtemp(prefix="zygote-", dir=parent)
        os.chmod(self.path, 0o711)

    def make(self, uid: int | None) -> str:
        box = tempfile.mkdtemp(prefix="box-", dir=self.path)
        if uid is not None:
            os.chown(box, uid, uid)
        return box

    def discard(self, box: str) -> None:
        """Removes a dead snippet's folder: at once when it holds nothing but the program, else in a forked helper."""
        try:
            if os.listdir(box) == ["main.py"]:
                os.unlink(os.path.join(box, "main.py"))
            os.rmdir(box)
            return
        except OSError:
            pass  # it holds more than the program: the helper removes it
        pid = os.fork()
        if pid == 0:
            try:
                remove_tree(box, self.path)
            finally:
                os._exit(0)
        removers.add(pid)

    def remove(self) -> None:
        """Removes this folder, and the pool's when that makes it empty: the pool may be dead, and nobody else would do it."""
        parent = os.path.dirname(self.path)
        remove_tree(self.path, parent)
        with contextlib.suppress(OSError):  # other zygotes are still at work in it
            os.rmdir(parent)


def remove_tree(path: str, base: str) -> None:
    """Removes `path` for good; `base` is a folder on the same file system in which it may park subfolders.

    Another process may be removing parts of it at the same time.
    """
    pending = [path]
    count = 0
    while pending:
        folder = pending[-1]
        parked = []
        try:
            os.chmod(folder, 0o700)
            with os.scandir(folder) as entries:
                found = list(entries)
        except FileNotFoundError:
            pending.pop()
            continue
        for entry in found:
            with contextlib.suppress(FileNotFoundError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                count += 1
                to = os.path.join(base, f".gone-{os.getpid()}-{count}")
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, to)
                parked.append(to)
        if parked:
            pending.extend(parked)
            continue
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(folder)
        pending.pop()


def exceeds(box: str, max_bytes: int, max_entries: int) -> bool:
    """Whether a running snippet's folder is over its limits, or holds a folder that cannot be looked into.

    Looks at `max_entries` entries at most, and never follows a link.
    """
    total = seen = 0
    pending = [os.open(box, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        while pending:
            folder = pending.pop()
            try:
                for entry in os.scandir(folder):
                    seen += 1
                    try:
                        info = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(info.st_mode):
                            pending.append(os.open(entry.name, _FOLDER, dir_fd=folder))
                    except FileNotFoundError:
                        continue  # gone again
                    except OSError:
                        return True  # closed to us, and so a place to hide in; or out of descriptors
                    total += info.st_blocks * 512
                    if seen > max_entries or total > max_bytes:
                        return True
            finally:
                os.close(folder)
        return False
    finally:
        for fd in pending:
            os.close(fd)
