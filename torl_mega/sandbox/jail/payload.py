"""The snippet as one memory file: the pool writes it, only the confined child reads it.

The zygote passes the descriptor on without looking, so no child ever inherits another snippet's code, input or files.
Layout: 4-byte length of a JSON header, the header, then code, stdin and each file's content, back to back.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

MAX_FILES = 512
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_NEW = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC

Span = tuple[int, int]
"""Offset and length in the memory file."""


@dataclass(frozen=True)
class Payload:
    """`fd` is borrowed. Input and files stay in it, so that their size costs the snippet none of its memory."""

    fd: int
    code: bytes
    stdin: Span
    files: dict[str, Span]

    def open_stdin(self) -> int:
        """A read-only descriptor of the input."""
        if self.stdin[1] == 0:
            return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        fd = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._copy(self.stdin, fd)
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd

    def write_files(self) -> None:
        """Writes the request's files into the working folder."""
        for name, span in self.files.items():
            folder = os.path.dirname(name)
            if folder:
                os.makedirs(folder, exist_ok=True)
            fd = os.open(name, _NEW, 0o644)
            self._copy(span, fd)
            os.close(fd)

    def _copy(self, span: Span, to: int) -> None:
        at, left = span
        while left:
            done = os.sendfile(to, self.fd, at, left)
            at, left = at + done, left - done


def clean_path(path: str) -> str:
    """A relative path that stays below the working folder. Raises ValueError for any other."""
    parts = [p for p in path.split("/") if p not in ("", ".")]
    if path.startswith("/tmp/"):  # the folder's name in tier A, accepted everywhere
        parts = parts[1:]
    elif path.startswith("/"):
        raise ValueError(f"file path {path!r} is absolute; paths are relative to the working folder")
    if not parts or ".." in parts or "\0" in path or len(path) > 1024:
        raise ValueError(f"file path {path!r} is empty, too long, or leaves the working folder")
    try:
        longest = max(len(p.encode()) for p in parts)
    except UnicodeEncodeError:
        raise ValueError(f"file path {path!r} is no UTF-8") from None
    if longest > 255:
        raise ValueError(f"file path {path[:60]!r}… has a name of {longest} bytes; a file system takes 255")
    return "/".join(parts)


def pack(code: bytes, stdin: bytes, files: Mapping[str, bytes]) -> bytes:
    if len(files) > MAX_FILES:
        raise ValueError(f"{len(files)} files are more than {MAX_FILES}")
    named = [(clean_path(name), content) for name, content in files.items()]
    header = json.dumps([len(code), len(stdin), [[name, len(content)] for name, content in named]]).encode()
    return b"".join((struct.pack("I", len(header)), header, code, stdin, *(content for _, content in named)))


def to_memfd(data: bytes) -> int:
    fd = os.memfd_create("snippet", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def read(fd: int) -> Payload:
    (length,) = struct.unpack("I", os.pread(fd, 4, 0))
    code_len, stdin_len, entries = json.loads(_pread(fd, length, 4))
    at = 4 + length
    code, at = _pread(fd, code_len, at), at + code_len
    stdin, at = (at, stdin_len), at + stdin_len
    files: dict[str, Span] = {}
    for name, size in entries:
        files[name], at = (at, size), at + size
    return Payload(fd, code, stdin, files)


def _pread(fd: int, size: int, at: int) -> bytes:
    data = os.pread(fd, size, at)
    if len(data) != size:
        raise EOFError(f"a payload ends after {at + len(data)} bytes instead of {at + size}")
    return data
