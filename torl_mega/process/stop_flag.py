"""SIGTERM and SIGUSR1 mean: drop what is being collected, save, exit 85. One flag, one hook."""

from __future__ import annotations

import signal
from collections.abc import Callable


class StopFlag:
    """Install once, in the main thread. `on_request` is called from the signal handler when it is set."""

    def __init__(self) -> None:
        self.requested = False
        self.on_request: Callable[[], object] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: object) -> None:
        self.requested = True
        if self.on_request is not None:
            self.on_request()
