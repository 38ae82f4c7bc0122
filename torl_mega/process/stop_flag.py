"""A request to stop, made by a signal. One flag, one hook: what a stop means is the process's own affair.

A rank drops what it is collecting, saves and exits with REQUEUE; a task and the launcher leave the note `stop`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable


class StopFlag:
    """Install once, in the main thread. `on_request` is called from the signal handler when it is set."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.requested = False
        self.interrupts = 0  # how often somebody pressed Ctrl-C
        self.signal_name = ""  # of the last one
        self.on_request: Callable[[], object] | None = None
        for number in numbers or (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        self.requested, self.signal_name = True, signal.Signals(number).name
        self.interrupts += number == signal.SIGINT
        if self.on_request is not None:
            self.on_request()
