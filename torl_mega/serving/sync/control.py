"""Calls to a server's control endpoints that are sent at once and answered later, all under one deadline.

A weight transfer has two halves, an HTTP call and a broadcast, and each waits for the other. So the caller's thread sends
a call at once (calls reach a server in the order they were made), and a daemon thread reads its answer.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import orjson

from torl_mega.errors import WeightSyncError
from torl_mega.process.secret import authorization

POLL_S = 0.0005


class Deadline:
    """The time limit of a whole sync; every wait in it takes what is left."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def later(self, grace_s: float) -> Deadline:
        """The same limit with some seconds more from its end, or from now where that is over."""
        other = Deadline(self.limit_s)
        other._end = max(self._end, time.monotonic()) + grace_s
        return other

    def check(self, what: str) -> None:
        """Raises WeightSyncError naming `what` when the time is over."""
        if self.left_s <= 0:
            raise WeightSyncError(f"{what}: not done within serving.sync_timeout_s = {self.limit_s:g} s")


class Call:
    """One call under way: POST, or GET without a body. `result` raises WeightSyncError naming the server unless the answer
    is 200."""

    def __init__(self, url: str, path: str, body: Mapping[str, Any] | None, deadline: Deadline) -> None:
        self.url, self.path = url, path
        self._deadline = deadline
        self._done = threading.Event()
        self._status, self._payload, self._error = 0, b"", ""
        deadline.check(f"{url}{path}")
        address = urlsplit(url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=deadline.left_s)
        try:
            data = None if body is None else orjson.dumps(body)
            method = "GET" if body is None else "POST"
            headers = {"Content-Type": "application/json", "Connection": "close", **authorization()}
            self._connection.request(method, path, data, headers)
        except OSError as exc:
            self._fail(exc)
            return
        threading.Thread(target=self._read, daemon=True, name=f"answer {url}{path}").start()

    def _read(self) -> None:
        try:
            answer = self._connection.getresponse()
            self._status, self._payload = answer.status, answer.read()
            self._connection.close()
            self._done.set()
        except (OSError, http.client.HTTPException) as exc:
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        self._connection.close()
        self._error = str(exc) or type(exc).__name__
        self._done.set()

    def done(self) -> bool:
        """Whether it was answered or has failed; does not wait."""
        return self._done.is_set()

    def result(self) -> Any:
        """Waits for the answer and parses it: JSON, else text."""
        if not self._done.wait(max(0.0, self._deadline.left_s)):
            self._deadline.check(f"{self.url}{self.path} gave no answer")
        return self._parsed()

    def check(self) -> None:
        """Raises when the call has failed by now; does not wait."""
        if self.done():
            self._parsed()

    def _parsed(self) -> Any:
        where = f"{self.url}{self.path}"
        if self._error:
            raise WeightSyncError(f"{where}: the server is gone or silent ({self._error})")
        if self._status != 200:
            raise WeightSyncError(
                f"{where} answered HTTP {self._status}: {self._payload[:500].decode(errors='replace')}"
            )
        try:
            return orjson.loads(self._payload)
        except ValueError:
            return self._payload.decode(errors="replace")


def call_all(urls: Sequence[str], path: str, body: Mapping[str, Any] | None, deadline: Deadline) -> list[Any]:
    """The same call to every server at once; answers in their order."""
    return [call.result() for call in [Call(url, path, body, deadline) for url in urls]]


def run_bounded(work: Any, what: str, deadline: Deadline, calls: Sequence[Call]) -> Any:
    """`work()`'s result, computed in a daemon thread. Raises WeightSyncError when it fails, when one of `calls` is refused,
    or at the deadline; the thread is then left behind."""
    box: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            box.append(work())
        except BaseException as exc:  # handed to the waiting thread below
            failure.append(exc)

    thread = threading.Thread(target=run, daemon=True, name=what)
    thread.start()
    while thread.is_alive():
        thread.join(0.01)
        watch(what, deadline, calls)
    if failure:
        raise WeightSyncError(f"{what}: {' '.join(str(failure[0]).split())[:300]}") from failure[0]
    return box[0]


def watch(what: str, deadline: Deadline, calls: Sequence[Call]) -> None:
    """Raises WeightSyncError when the deadline has passed or one of `calls` was refused."""
    for call in calls:
        call.check()
    deadline.check(what)
