"""The servers of a run: which of them can be used, and which one takes the next request.

A suspended server is polled every second (ready, scheduler awake, accepted version), so a restarted one rejoins by itself
after the next weight sync. A server with requests is polled too: when its scheduler stays silent for `hang_timeout_s` it
is suspended and its requests are handed back to be made elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

import aiohttp

from torl_mega.errors import GenerationError, ServerError, StaleServers
from torl_mega.serving.generation import version_number

POLL_S = 1.0
PROBE_TIMEOUT_S = 5.0
MAX_ROUTES = 65536  # remembered prefixes; the oldest are forgotten
STALE = "wrong_version"
STALE_LIMIT_S = 15.0  # a sync that is under way in another thread may take servers there within that
SLACK = 8  # requests a sticky server may be ahead of the least busy one before a prefix moves


class Server:
    """One server by its URL, with the requests it is working on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.suspended: str | None = None  # why it is not used, or None
        self.num_outstanding = 0
        self.silent_since: float | None = None  # monotonic time of the first unanswered probe in a row
        self.woken = asyncio.Event()  # look at this server now
        self._lost: set[asyncio.Future[None]] = set()

    @contextlib.contextmanager
    def holding(self) -> Iterator[asyncio.Future[None]]:
        """Counts one request while it is entered. The future resolves when the server is found hanging."""
        lost = asyncio.get_running_loop().create_future()
        self._lost.add(lost)
        self.num_outstanding += 1
        try:
            yield lost
        finally:
            self.num_outstanding -= 1
            self._lost.discard(lost)

    def hand_back(self) -> None:
        """Wakes everyone who waits for this server."""
        for lost in self._lost:
            if not lost.done():
                lost.set_result(None)


class Fleet:
    """See the module's docstring. `accepts` says which policy versions may be used at the moment."""

    def __init__(
        self, urls: Sequence[str], counters: Counter[str], accepts: Callable[[int], bool], *, hang_timeout_s: float
    ) -> None:
        if not urls:
            raise ServerError("no generation server is known; set serving.urls or serving.num_servers")
        self._servers = [Server(url.rstrip("/")) for url in urls]
        self._counters = counters
        self._accepts = accepts
        self._hang_timeout_s = hang_timeout_s
        self._routes: OrderedDict[str, Server] = OrderedDict()
        self._changed = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._watchers: list[asyncio.Task[None]] = []

    def start(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._watchers = [asyncio.ensure_future(self._watch(server)) for server in self._servers]

    async def close(self) -> None:
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers = []

    def up(self) -> list[Server]:
        return [server for server in self._servers if server.suspended is None]

    async def pick(self, route_key: str, timeout_s: float) -> Server:
        """The server for one more request: that of its prefix unless it is much busier than the least busy one. Waits while
        all are suspended. Raises GenerationError after `timeout_s`, and StaleServers much earlier when all are back but
        hold other weights: only a sync can help then."""
        begun = stale_since = time.monotonic()
        while not (up := self.up()):
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            now, states = time.monotonic(), ", ".join(f"{s.url}: {s.suspended}" for s in self._servers)
            stale_since = stale_since if all(s.suspended == STALE for s in self._servers) else now
            if now - stale_since > STALE_LIMIT_S:
                raise StaleServers(f"no server holds the policy's weights ({states}); sync them and go on")
            if now - begun > timeout_s:
                raise GenerationError(f"every server was unusable for {timeout_s:g} s ({states})")
        least = min(up, key=lambda server: server.num_outstanding)
        sticky = self._routes.get(route_key)
        keep = sticky is not None and sticky in up and sticky.num_outstanding <= 2 * least.num_outstanding + SLACK
        chosen = sticky if sticky is not None and keep else least
        self._routes[route_key] = chosen
        self._routes.move_to_end(route_key)
        if len(self._routes) > MAX_ROUTES:
            self._routes.popitem(last=False)
        return chosen

    def suspend(self, server: Server, why: str) -> None:
        if server.suspended is None:
            self._counters["server_suspended"] += 1
            server.woken.set()
        server.suspended = why

    async def _watch(self, server: Server) -> None:
        while True:
            if server.suspended is not None:
                if await self._usable(server):
                    server.suspended, server.silent_since = None, None
                    self._counters["server_rejoined"] += 1
                    self._changed.set()
            elif server.num_outstanding:  # an idle server cannot keep anybody waiting
                await self._check_scheduler(server)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.woken.wait(), POLL_S)
            server.woken.clear()

    async def _check_scheduler(self, server: Server) -> None:
        """Suspends a server whose scheduler has not answered for `hang_timeout_s`."""
        asked = time.monotonic()
        if await self._get(server, "/server_info") is not None:
            server.silent_since = None
            return
        # one unanswered probe may be this event loop's own pause; several over hang_timeout_s are the server's
        server.silent_since = asked if server.silent_since is None else server.silent_since
        if time.monotonic() - server.silent_since > self._hang_timeout_s and asked != server.silent_since:
            self.suspend(server, "hang")
            server.hand_back()

    async def _usable(self, server: Server) -> bool:
        """Ready, awake, and of an accepted version."""
        info = await self._get(server, "/model_info")
        if info is None or await self._get(server, "/server_info") is None:
            return False
        if self._accepts(version_number(str(info.get("weight_version", "")))):
            return True
        if server.suspended is not None:
            server.suspended = STALE
        return False

    async def _get(self, server: Server, path: str) -> dict[str, object] | None:
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
            async with self._session.get(server.url + path, timeout=timeout) as answer:
                if answer.status == 200:
                    return await answer.json()
        return None
