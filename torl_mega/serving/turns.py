"""Whose memory is on the GPUs that ranks and servers share: a state machine of four turns.

                 trainer holds                      servers hold
    train        weights, gradients, optimizer      nothing
    sync         weights                            weights
    sample       weights, unless they are parked    weights, KV cache, CUDA graphs
    save         weights, optimizer                 weights

    collect, evaluate: sample ─► old log-probs, update: train ─► sync ─► sample ─► (save ─► sample)

Contract: in every change each side first lets go of what it does not keep, on every rank and every server, and only then the
other takes; so a GPU never holds more than the larger of two turns. Servers' weights come back empty and are filled by the sync
that follows; until then a server's version is `asleep`, which no client accepts. A server that is down is left out; it starts
again in a turn of the servers (gate.py) with all its memory, and joins the next change.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from torl_mega.errors import ServerError, WeightSyncError
from torl_mega.interfaces import Share, Trainer
from torl_mega.serving.gate import TrainerGate
from torl_mega.serving.sync.control import Call, Deadline

Parts = frozenset[str]

ASLEEP = "asleep"
IDLE_S = 30  # for requests that are being aborted
RETRY_S = 1.0

NOTHING: Parts = frozenset()
WEIGHTS = frozenset({"weights"})
EVERYTHING = frozenset({"weights", "kv_cache", "cuda_graph"})  # of a server, in SGLang's words


class SharedServers:
    """Rank 0's hand on the servers' memory."""

    def __init__(self, urls: Sequence[str], gate: TrainerGate, *, limit_s: float, startup_s: float) -> None:
        """`limit_s`: longest silence of a living server before its supervisor ends it, and then some."""
        self._urls, self._gate = tuple(urls), gate
        self._limit_s, self._startup_s = limit_s, startup_s

    def hold(self, parts: Parts) -> int:
        """Every server holds exactly these parts; returns how many do. Raises ServerError for one that neither obeys nor dies."""
        if parts != EVERYTHING:
            self._gate.close()
        calls: list[tuple[str, dict[str, Any]]] = []
        if gone := sorted(EVERYTHING - parts):
            # nothing may run: SGLang's scheduler asserts it
            calls += [("/abort_request", {"abort_all": True}), (f"/flush_cache?timeout={IDLE_S}", {})]
            calls += [("/release_memory_occupation", {"tags": gone})]
        if "weights" in gone:
            calls += [("/update_weight_version", {"new_version": ASLEEP, "abort_all_requests": False})]
        if parts:
            calls += [("/resume_memory_occupation", {"tags": sorted(parts)})]
        with ThreadPoolExecutor(min(32, len(self._urls))) as threads:
            obeyed = sum(threads.map(partial(self._tell, calls=calls), self._urls))
        if parts == EVERYTHING:
            self._gate.open()
        return obeyed

    def wait_for_one(self) -> None:
        """Returns when a server answers. Raises ServerError when none does within the time that one takes to start."""
        deadline = time.monotonic() + self._startup_s
        while not any(_listens(url) for url in self._urls):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"no server came back within serving.startup_timeout_s = {self._startup_s:g} s; see logs"
                )
            time.sleep(RETRY_S)

    def _tell(self, url: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> bool:
        """Makes the calls one after the other; False when the server is gone."""
        deadline = Deadline(self._limit_s)
        while True:
            try:
                for path, body in calls:
                    Call(url, path, body, deadline).result()
                return True
            except WeightSyncError as exc:
                if not _listens(url):
                    return False
                if deadline.left_s < RETRY_S:
                    raise ServerError(f"{url} does not give its GPUs to the trainer: {exc}") from exc
                time.sleep(RETRY_S)


class SharedGpus:
    """The state machine, on every rank; the turn is `train` when it is made. `servers`: rank 0's, None elsewhere."""

    def __init__(self, trainer: Trainer, servers: SharedServers | None, share: Share, *, park_weights: bool) -> None:
        self._trainer, self._servers, self._share = trainer, servers, share
        self._sampling = NOTHING if park_weights else WEIGHTS
        self._ours, self._theirs = frozenset({"weights", "gradients", "optimizer"}), NOTHING

    def train(self) -> None:
        self._change(frozenset({"weights", "gradients", "optimizer"}), NOTHING)

    def sync(self) -> None:
        """When every server has died, they start again first."""
        if self._change(WEIGHTS, WEIGHTS):
            return
        self.sample()
        self._share(lambda: self._servers and self._servers.wait_for_one())
        self._change(WEIGHTS, WEIGHTS)

    def sample(self) -> None:
        self._change(self._sampling, EVERYTHING)

    def save(self) -> None:
        self._change(frozenset({"weights", "optimizer"}), self._theirs & WEIGHTS)

    def _change(self, ours: Parts, theirs: Parts) -> int:
        """How many servers obeyed; 1 when they had nothing to do."""
        obeyed = 1
        if ours & self._ours != self._ours:
            self._trainer.hold(ours & self._ours)
        for parts in (theirs & self._theirs, theirs):
            if parts != self._theirs:
                obeyed = self._share(lambda parts=parts: self._servers.hold(parts) if self._servers else 0)
                self._theirs = parts
        if ours != ours & self._ours:
            self._trainer.hold(ours)
        self._ours = ours
        return obeyed


class Resident:
    """Ranks and servers keep their memory all the time: nothing to do."""

    def train(self) -> None: ...

    def sync(self) -> None: ...

    def sample(self) -> None: ...

    def save(self) -> None: ...


def _listens(url: str) -> bool:
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=5):
            return True
    except OSError:
        return False
