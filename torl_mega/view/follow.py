"""`torl view --follow`: the page of a run that trains, served on this machine alone.

    every 2 s: new or changed sets ─► files below view/ ─► manifest, which the page asks for
    GET, HEAD ─► a file below view/ and nothing else

Contract: listens on 127.0.0.1, answers only requests that name this machine (a page of another site whose name was made to
point here gets nothing), reads only files below the one folder, lists no folder, writes on no request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from torl_mega.errors import DataError

HOST = "127.0.0.1"
POLL_S = 2.0
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}


class Server(ThreadingHTTPServer):
    """Serves the files below `folder`. Raises DataError for a port that is taken."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder.resolve()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as exc:
            raise DataError(
                f"--port {port} cannot be used: {exc.strerror}; choose another, or 0 for a free one"
            ) from None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "torl", ""
    server: Server

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = self._file()
        try:
            content = path.read_bytes() if path is not None else None
        except OSError:
            content = None
        if path is None or content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", KINDS[path.suffix])
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _file(self) -> Path | None:
        """The file that was asked for, None unless it is one of the page's below the folder."""
        asked = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        try:
            path = (self.server.folder / asked).resolve()
            inside = path.is_relative_to(self.server.folder) and path.suffix in KINDS and path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            return None
        return path if inside else None

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the page asks every two seconds."""


def serve(
    folder: Path, update: Callable[[], None], *, port: int, ready: Callable[[str], None], stop: threading.Event
) -> None:
    """Serves `folder` and calls `update` every two seconds until `stop` is set or Ctrl-C. `ready` is told the address."""
    with Server(folder, port) as server:
        thread = threading.Thread(target=server.serve_forever, name="torl view", daemon=True)
        try:
            thread.start()
            ready(server.url)
            while True:
                update()
                if stop.wait(POLL_S):
                    return
        except KeyboardInterrupt:
            pass
        finally:
            server.shutdown()
            thread.join()
