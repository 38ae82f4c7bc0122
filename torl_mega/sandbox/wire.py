"""The unix-socket protocol between SandboxClient and the pool process: frames of a JSON header and raw bytes.

    u32 header length, u32 blob length, header, blob

    client -> pool  {"op": "run", "id", limits…, "fetch": […], "sizes": [code, stdin], "files": [[name, size]…]}
                    {"op": "cancel", "id"}   {"op": "ping"}
    pool -> client  {"op": "result", "id", status…, "sizes": [stdout, stderr], "files": [[name, size]…]}   {"op": "pong"}

Any number of calls share one connection; answers come in any order. Code and output are bytes in the blob, so lone
surrogates and broken UTF-8 survive. Both ends trust each other: the socket is 0600.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any, cast

from torl_mega.types import ExecutionRequest, ExecutionResult, ExecutionStatus

_HEAD = struct.Struct("<II")
MAX_FRAME = 1 << 30


def frame(header: Mapping[str, Any], *blobs: bytes) -> bytes:
    head = json.dumps(header).encode()
    return b"".join((_HEAD.pack(len(head), sum(map(len, blobs))), head, *blobs))


class FrameProtocol(asyncio.Protocol):
    """Cuts the byte stream into frames; subclasses handle `frame_received` and `connection_lost`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            head, blob = _HEAD.unpack_from(self._buffer, at)
            end = at + _HEAD.size + head + blob
            if head + blob > MAX_FRAME:
                assert self.transport is not None
                self.transport.abort()
                return
            if len(self._buffer) < end:
                break
            start = at + _HEAD.size
            header = json.loads(self._buffer[start : start + head])
            self.frame_received(header, bytes(self._buffer[start + head : end]))
            at = end
        del self._buffer[:at]

    def frame_received(self, header: dict[str, Any], blob: bytes) -> None:
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)


def request_frame(call_id: int, request: ExecutionRequest) -> bytes:
    code, stdin = (text.encode("utf-8", "surrogatepass") for text in (request.code, request.stdin))
    header = {
        "op": "run", "id": call_id, "wall_s": request.wall_s, "cpu_s": request.cpu_s, "memory_mb": request.memory_mb,
        "output_bytes": request.output_bytes, "fetch": list(request.fetch_files), "sizes": [len(code), len(stdin)],
        "files": [[name, len(content)] for name, content in request.files.items()],
    }  # fmt: skip
    return frame(header, code, stdin, *request.files.values())


def parse_request(header: dict[str, Any], blob: bytes) -> ExecutionRequest:
    texts, files = _split(header, blob)
    return ExecutionRequest(
        code=texts[0], stdin=texts[1], files=files, fetch_files=tuple(header["fetch"]), wall_s=header["wall_s"],
        cpu_s=header["cpu_s"], memory_mb=header["memory_mb"], output_bytes=header["output_bytes"],
    )  # fmt: skip


def result_frame(call_id: int, result: ExecutionResult) -> bytes:
    out, err = (text.encode("utf-8", "surrogatepass") for text in (result.stdout, result.stderr))
    header = {
        "op": "result", "id": call_id, "status": result.status.value, "return_code": result.return_code,
        "wall_s": result.wall_s, "cpu_s": result.cpu_s, "max_rss_mb": result.max_rss_mb, "message": result.message,
        "sizes": [len(out), len(err)], "files": [[name, len(content)] for name, content in result.files.items()],
    }  # fmt: skip
    return frame(header, out, err, *result.files.values())


def parse_result(header: dict[str, Any], blob: bytes) -> ExecutionResult:
    texts, files = _split(header, blob)
    return ExecutionResult(
        status=ExecutionStatus(header["status"]), return_code=header["return_code"], stdout=texts[0], stderr=texts[1],
        wall_s=header["wall_s"], cpu_s=header["cpu_s"], max_rss_mb=header["max_rss_mb"], files=files,
        message=header["message"],
    )  # fmt: skip


def _split(header: dict[str, Any], blob: bytes) -> tuple[list[str], dict[str, bytes]]:
    at = 0
    texts = []
    for size in header["sizes"]:
        texts.append(blob[at : at + size].decode("utf-8", "surrogatepass"))
        at += size
    files = {}
    for name, size in header["files"]:
        files[name] = blob[at : at + size]
        at += size
    return texts, files
