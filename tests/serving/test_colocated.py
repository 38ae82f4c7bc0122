"""The turns on shared GPUs: with a ledger of who holds what, and through the real server's endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import orjson
import pytest
import torch
from live_server import LiveServer
from reference import Reference, random_weights

from torl_mega.config import Config
from torl_mega.errors import WeightSyncError
from torl_mega.serving.colocated import Phase, SharedGpus
from torl_mega.serving.probe import prompt_logprobs
from torl_mega.serving.sync.weights import make_weight_sink

GB = {"weights": 15, "kv_cache": 30, "cuda_graph": 2}
TRAINER_STATE_GB, CARD_GB = 45, 80


class Ledger:
    """One card: what servers and trainer hold on it. Taking more than there is, or freeing twice, is an error."""

    def __init__(self) -> None:
        self.held = dict(GB)
        self.peak = self.total
        self.running = True
        self.events: list[str] = []

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def take(self, name: str, gb: int) -> None:
        assert name not in self.held, f"{name} taken twice"
        self.held[name] = gb
        self.peak = max(self.peak, self.total)
        self.events.append(f"+{name}")

    def give(self, name: str) -> None:
        del self.held[name]
        self.events.append(f"-{name}")

    def serve(self, path: str, body: dict[str, Any]) -> None:
        """As SGLang does: a release with requests running is fatal, and so is a tag that was not released."""
        if path == "/pause_generation":
            self.running = False
        if path == "/continue_generation":
            assert "kv_cache" in self.held
            self.running = True
        for tag in body.get("tags", ()):
            if path == "/release_memory_occupation":
                assert not self.running, "release_memory_occupation should be called only when server is idle"
                self.give(tag)
            else:
                self.take(tag, GB[tag])


@pytest.fixture
def ledger() -> Iterator[tuple[Ledger, str]]:
    book = Ledger()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                book.serve(self.path, body)
                self.send_response(200)
            except (AssertionError, KeyError) as exc:
                self.send_response(400, str(exc))
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"null")

        def log_message(self, *_args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield book, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def turns(book: Ledger, url: str) -> SharedGpus:
    return SharedGpus(
        [url],
        offload=lambda: book.give("trainer"),
        restore=lambda: book.take("trainer", TRAINER_STATE_GB),
        timeout_s=10,
    )


def test_the_card_is_never_full_and_the_order_is_kept(ledger: tuple[Ledger, str]) -> None:
    book, url = ledger
    gpus = turns(book, url)
    for _ in range(3):
        book.events.clear()
        gpus.sleep()
        assert book.held == {"trainer": TRAINER_STATE_GB}
        gpus.wake_weights()
        assert book.held == {"weights": GB["weights"]}
        gpus.wake_cache()
        assert book.held == GB
        assert book.events == [
            "-kv_cache", "-weights", "-cuda_graph", "+trainer", "-trainer", "+weights", "+kv_cache", "+cuda_graph",
        ]  # fmt: skip
    assert book.peak <= CARD_GB
    assert book.peak == max(sum(GB.values()), TRAINER_STATE_GB)


@pytest.mark.parametrize(
    ("before", "verb"),
    [((), "wake_weights"), ((), "wake_cache"), (("sleep",), "sleep"), (("sleep",), "wake_cache"),
     (("sleep", "wake_weights"), "sleep"), (("sleep", "wake_weights"), "wake_weights")],
)  # fmt: skip
def test_a_call_out_of_turn_changes_nothing(ledger: tuple[Ledger, str], before: tuple[str, ...], verb: str) -> None:
    book, url = ledger
    gpus = turns(book, url)
    for name in before:
        getattr(gpus, name)()
    held, phase = dict(book.held), gpus.phase
    with pytest.raises(WeightSyncError, match=f"{verb} in phase {phase}, it belongs to"):
        getattr(gpus, verb)()
    assert (book.held, gpus.phase) == (held, phase)


def test_a_server_that_refuses_stops_the_turn(ledger: tuple[Ledger, str]) -> None:
    book, url = ledger
    gpus = turns(book, url)
    book.give("kv_cache")  # the server does not hold what it is to release
    with pytest.raises(WeightSyncError, match="release_memory_occupation answered HTTP 400"):
        gpus.sleep()
    assert gpus.phase is Phase.GENERATING


def test_the_real_server_goes_through_the_turns(
    live_server: LiveServer, tiny_config: Config, reference: Reference
) -> None:
    """On a CPU nothing is freed, but every call and its order are the real ones."""
    states: list[str] = []
    gpus = SharedGpus(
        [live_server.url], offload=lambda: states.append("off"), restore=lambda: states.append("on"), timeout_s=30
    )
    sink = make_weight_sink(tiny_config.serving, [live_server.url])
    for number in (101, 102):
        gpus.sleep()
        gpus.wake_weights()
        weights = random_weights(reference.original(), number)
        sink.update(iter(weights.items()), version=number)
        gpus.wake_cache()
        reference.load(weights)
        prompt = list(range(40, 60))
        there = torch.from_numpy(asyncio.run(prompt_logprobs(live_server.url, prompt)))[1:]
        assert float((there - reference.logprobs(prompt[:1], prompt[1:])).abs().max()) < 1e-4
    assert states == ["on", "off"] * 2
