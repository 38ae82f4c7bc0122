"""One snippet as one memory file: the pool writes it, only the confined child reads it.

The zygote passes the descriptor on without looking, so no child ever inherits another snippet's code, input or files.
Layout: 4-byte length of a JSON header, the header, then code, stdin and each file's content, back to back.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

MAX_FILES = 512


@dataclass(frozen=True)
class Payload:
    code: bytes
    stdin: bytes
    files: dict[str, bytes]


def clean_path(path: str) -> str:
    """A relative path that stays below the working folder. Raises ValueError for any other."""
    parts = [p for p in path.split("/") if p not in ("", ".")]
    if path.startswith("/tmp/"):  # the folder's name in tier A, accepted everywhere
        parts = parts[1:]
    elif path.startswith("/"):
        raise ValueError(f"file path {path!r} is absolute; paths are relative to the working folder")
    if not parts or ".." in parts or "\0" in path or len(path) > 1024:
        raise ValueError(f"file path {path!r} is empty, too long, or leaves the working folder")
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
    size = os.fstat(fd).st_size
    data = b""
    while len(data) < size:
        data += os.pread(fd, size - len(data), len(data))
    (length,) = struct.unpack_from("I", data)
    code_len, stdin_len, entries = json.loads(data[4 : 4 + length])
    at = 4 + length
    code, at = data[at : at + code_len], at + code_len
    stdin, at = data[at : at + stdin_len], at + stdin_len
    files: dict[str, bytes] = {}
    for name, size in entries:
        files[name], at = data[at : at + size], at + size
    return Payload(code, stdin, files)
