"""Reads files back out of a dead snippet's folder, by the handle its child gave away before foreign code ran.

What lies there is hostile: links are not followed, FIFOs and devices are not opened, sizes are bounded.
"""

from __future__ import annotations

import os
import socket
import stat

from torl_mega.sandbox.jail.payload import clean_path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_back(channel: socket.socket, paths: tuple[str, ...], max_bytes: int) -> dict[str, bytes]:
    """The regular files among `paths`, under the names they were asked by; together at most `max_bytes`.

    What is missing, too large or outside the folder is left out, as SandboxFusion does.
    """
    channel.setblocking(False)
    try:
        _, fds, _, _ = socket.recv_fds(channel, 16, 1)
    except OSError:
        return {}  # it ended before it had a folder
    if not fds:
        return {}
    out: dict[str, bytes] = {}
    try:
        for path in paths:
            try:
                inside = clean_path(path)
            except ValueError:
                continue
            content = _read(fds[0], inside, max_bytes - sum(map(len, out.values())))
            if content is not None:
                out[path] = content
    finally:
        os.close(fds[0])
    return out


def _read(folder: int, path: str, room: int) -> bytes | None:
    *parents, name = path.split("/")
    opened = [os.dup(folder)]
    try:
        for part in parents:
            opened.append(os.open(part, _FOLDER, dir_fd=opened[-1]))
        opened.append(os.open(name, _FILE, dir_fd=opened[-1]))
        info = os.fstat(opened[-1])
        if not stat.S_ISREG(info.st_mode) or info.st_size > room:
            return None
        with open(os.dup(opened[-1]), "rb") as f:
            return f.read(room)
    except OSError:
        return None
    finally:
        for fd in opened:
            os.close(fd)
