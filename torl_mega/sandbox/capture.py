"""One output stream of a snippet: drained as it comes, head and tail kept, the rest counted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_CHUNK = 1 << 16


class Capture:
    """Reads `fd` (non-blocking, owned) on the running loop. Calls `on_flood` once past `flood_bytes`."""

    def __init__(self, fd: int, keep_bytes: int, flood_bytes: int, on_flood: Callable[[], None]) -> None:
        self.fd = fd
        self.total = 0
        self._head_size = (keep_bytes + 1) // 2
        self._tail_size = keep_bytes - self._head_size
        self._keep = keep_bytes
        self._head = bytearray()
        self._tail = bytearray()
        self._flood_bytes = flood_bytes
        self._on_flood = on_flood
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read_once)

    def _read_once(self) -> bool:
        """False when nothing more is there now."""
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self.fd)
            return False
        self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        before = self.total
        self.total += len(data)
        room = self._keep - len(self._head) if not self._tail else 0
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data
            if len(self._tail) > 2 * self._keep + _CHUNK:
                del self._tail[: len(self._tail) - self._keep]
        if before <= self._flood_bytes < self.total:
            self._on_flood()

    def finish(self) -> str:
        """Takes what is left in the pipe (the writer is dead), closes it and returns the text."""
        for _ in range(64):  # a pipe holds 1 MiB at most
            if not self._read_once():
                break
        self.close()
        if self.total <= self._keep:
            return self._head.decode("utf-8", "replace")
        kept = (self._head + self._tail)[-self._tail_size :] if self._tail_size else bytearray()
        head = self._head[: self._head_size].decode("utf-8", "replace")
        left_out = self.total - self._head_size - len(kept)
        return f"{head}\n... [{left_out} bytes left out] ...\n{kept.decode('utf-8', 'replace')}"

    def close(self) -> None:
        if self.fd >= 0:
            self._loop.remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1
