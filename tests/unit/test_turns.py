"""Whose turn it is: who lets go before who takes, what a turn needs, and when a server may start. No engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_loop import Recorder, loop

from torl_mega.errors import ServerError, StaleServers
from torl_mega.serving.gate import ServerGate, TrainerGate
from torl_mega.serving.turns import EVERYTHING, SharedGpus

GIB = {"weights": 7, "gradients": 14, "optimizer": 10, "kv_cache": 40, "cuda_graph": 1}


class Gpu:
    """Trainer and servers in one: what each has on the GPU, and what was there at most."""

    def __init__(self, alive: int = 1) -> None:
        self.ours, self.theirs = frozenset({"weights", "gradients", "optimizer"}), frozenset[str]()
        self.alive, self.calls = alive, list[str]()
        self.peak = self.used()
        self.trainer, self.servers = self.Side(self, "ours"), self.Side(self, "theirs")

    class Side:
        def __init__(self, gpu: Gpu, name: str) -> None:
            self.gpu, self.name = gpu, name

        def hold(self, parts: frozenset[str]) -> int:
            setattr(self.gpu, self.name, parts)
            self.gpu.peak = max(self.gpu.peak, self.gpu.used())
            return self.gpu.alive

        def wait_for_one(self) -> None:
            self.gpu.calls.append(f"wait {sorted(self.gpu.theirs)}")
            self.gpu.alive = 1

    def used(self) -> int:
        return sum(GIB[part] for part in (*self.ours, *self.theirs))

    def turns(self, *, park_weights: bool = False) -> SharedGpus:
        return SharedGpus(self.trainer, self.servers, lambda make: make(), park_weights=park_weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("park_weights", [False, True])
def test_no_turn_and_no_change_holds_more_than_the_larger_turn(park_weights: bool) -> None:
    gpu = Gpu()
    turns = gpu.turns(park_weights=park_weights)
    sampling = (0 if park_weights else 7) + 7 + 40 + 1
    for verb, expected in [
        ("train", 31), ("sync", 14), ("sample", sampling), ("train", 31), ("sync", 14), ("sample", sampling),
        ("save", 24), ("sample", sampling), ("sync", 14), ("sample", sampling), ("sample", sampling),
    ]:  # fmt: skip
        before = gpu.peak = gpu.used()
        getattr(turns, verb)()
        assert gpu.used() == expected, verb
        assert gpu.peak <= max(before, expected), verb
    turns.train()
    turns.save()  # the servers' weights are gone already, and are not taken back empty
    assert gpu.used() == 17


def test_servers_that_all_died_come_back_in_a_turn_of_their_own_before_the_sync() -> None:
    gpu = Gpu(alive=0)
    gpu.turns(park_weights=True).sync()
    assert gpu.calls == [f"wait {sorted(EVERYTHING)}"]
    assert (gpu.ours, gpu.theirs) == (frozenset({"weights"}), frozenset({"weights"}))


class Logged(Recorder):
    """Writes its turns among the calls of the loop."""

    def __getattr__(self, name: str):
        if name not in ("train", "sync", "sample", "save"):
            raise AttributeError(name)
        return lambda: self.calls.append(f"<{name}>")


def test_every_stage_of_the_loop_asks_for_its_turn() -> None:
    fake = Logged()
    assert loop(fake, num_steps=1, turns=fake).run(0, evaluate_first=True)
    assert fake.calls == [
        "<sample>", "eval 0", "<sample>", "collect 0", "<train>", "old", "update 2", "update 2", "<sync>", "sync 1", "log 0",
        "<sample>", "eval 1", "<save>", "save 1",
    ]  # fmt: skip
    fake, failures = Logged(), [StaleServers("restarted")]
    collect = fake.collect

    def flaky(step: int):
        if failures:
            raise failures.pop()
        return collect(step)

    fake.collect = flaky  # type: ignore[method-assign]
    loop(fake, num_steps=1, turns=fake).run(0, evaluate_first=False)
    assert fake.calls[:5] == ["<sample>", "<sync>", "sync 0", "<sample>", "collect 0"]


def test_a_server_starts_only_while_servers_have_the_gpus(tmp_path: Path) -> None:
    server, trainer = ServerGate(tmp_path, "n0", 7), TrainerGate(tmp_path, 0.0)

    async def scenario() -> None:
        assert not await server.enter(), "the first start is before any turn"
        with pytest.raises(ServerError, match=r"n0:7 did not start within serving\.startup_timeout_s = 0 s"):
            trainer.close()  # and the trainer's turn waits for it
        server.passed()
        trainer.close()
        entering = asyncio.ensure_future(server.enter())
        await asyncio.wait({entering}, timeout=0.5)
        assert not entering.done()
        trainer.close()  # does not wait for a server that waits
        trainer.open()
        assert await asyncio.wait_for(entering, 5)

    asyncio.run(scenario())


def test_a_server_started_by_hand_has_no_gate() -> None:
    assert not asyncio.run(ServerGate(None, "n0", 7).enter())
    TrainerGate(None, 0.0).close()
