"""The client against faults on demand; and the stub that makes them against the real server's answers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections import deque
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest
from live_server import LiveServer
from stub import Behaviour, Stub

from torl_mega.config import ServingConfig
from torl_mega.errors import GenerationError, StaleServers
from torl_mega.layout import describe_model
from torl_mega.planner.known_models import KNOWN
from torl_mega.serving.client import SGLangClient
from torl_mega.types import FinishReason, GenerationRequest

FAST = ServingConfig(request_timeout_s=30, max_retries=3, hang_timeout_s=30)


def ask(**changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "token_ids": (1, 2, 3), "max_new_tokens": 10, "temperature": 1.0, "top_p": 1.0, "stop": (), "seed": 5,
        "route_key": "k",
    }  # fmt: skip
    return GenerationRequest(**(fields | changes))


def client_of(*stubs: Stub, config: ServingConfig = FAST) -> SGLangClient:
    return SGLangClient([stub.url for stub in stubs], config, vocab_size=100)


def mangle(**changes: Any) -> Behaviour:
    def edit(tree: dict[str, Any]) -> None:
        for key, value in changes.items():
            (tree if key in tree else tree["meta_info"])[key] = value

    return Behaviour(edit=edit)


FAULTS = [
    (Behaviour("http", status=500), "server_error"),
    (Behaviour("reset"), "server_down"),
    (Behaviour("garbage"), "bad_answer"),
    (mangle(output_ids=[1, 2]), "bad_answer"),
    (mangle(output_token_logprobs=[[0.5, i, None] for i in range(3, 13)]), "bad_answer"),
    (mangle(output_token_logprobs=[[float("nan"), i, None] for i in range(3, 13)]), "bad_answer"),
    (mangle(weight_versions=[{"version": "0", "start": 0, "end": 9}]), "bad_answer"),
    (mangle(weight_versions=[{"version": "7", "start": 0, "end": 10}]), "wrong_version"),
    (mangle(weight_versions=[{"version": "default", "start": 0, "end": 10}]), "wrong_version"),
    (mangle(finish_reason={"type": "abort", "message": "x", "status_code": 500, "err_type": "E"}), "server_error"),
]


@pytest.mark.parametrize(("fault", "counter"), FAULTS)
def test_a_fault_is_retried_and_counted(fault: Behaviour, counter: str) -> None:
    async def run() -> None:
        async with Stub(script=deque([fault])) as bad, client_of(bad) as client:
            client.expect_version(0)
            generation = await client.generate(ask())
            assert len(generation.token_ids) == 10
            assert set(generation.policy_versions) == {0}
            assert client.counters[counter] == 1
            assert client.counters["generation_retry"] == 1
            assert bad.bodies[0]["input_ids"] == bad.bodies[1]["input_ids"] == [1, 2, 3]
            assert bad.bodies[0]["sampling_params"]["sampling_seed"] == 5
            assert bad.bodies[0]["rid"] != bad.bodies[1]["rid"]

    asyncio.run(run())


def test_a_full_queue_is_waited_for_and_no_fault() -> None:
    async def run() -> None:
        async with Stub(script=deque([Behaviour("http", status=503)] * 2)) as full, client_of(full) as client:
            client.expect_version(0)
            assert len((await client.generate(ask())).token_ids) == 10
            assert client.counters == {"server_busy": 2}

    asyncio.run(run())


def test_the_last_retry_says_every_cause() -> None:
    async def run() -> None:
        async with Stub(script=deque([Behaviour("http", status=500)] * 9)) as bad, client_of(bad) as client:
            with pytest.raises(GenerationError, match=r"HTTP 500: made to fail; .*HTTP 500") as caught:
                await client.generate(ask())
            assert len(bad.bodies) == 1 + FAST.max_retries
            assert "\n" not in str(caught.value)

    asyncio.run(run())


def test_a_request_that_is_wrong_is_not_retried() -> None:
    async def run() -> None:
        async with Stub(script=deque([Behaviour("http", status=400)])) as stub, client_of(stub) as client:
            with pytest.raises(GenerationError, match="refused the request: made to fail"):
                await client.generate(ask())
            assert len(stub.bodies) == 1

    asyncio.run(run())


def test_a_hanging_request_is_aborted_and_made_elsewhere() -> None:
    async def run() -> None:
        config = ServingConfig(request_timeout_s=0.5)
        async with Stub(script=deque([Behaviour("hang")])) as bad, Stub() as good:
            async with client_of(bad, good, config=config) as client:
                generation = await client.generate(ask())
                assert len(generation.token_ids) == 10
                assert bad.aborted == [bad.bodies[0]["rid"]]
                assert client.counters["hang"] == 1
                assert len(good.bodies) == 1

    asyncio.run(run())


def test_a_silent_scheduler_gives_its_requests_back() -> None:
    config = ServingConfig(request_timeout_s=600, hang_timeout_s=1.0)

    async def run() -> None:
        async with Stub(script=deque([Behaviour("hang")] * 4), silent=True) as bad, Stub() as good:
            async with client_of(bad, good, config=config) as client:
                await asyncio.wait_for(asyncio.gather(*(client.generate(ask(route_key=str(n))) for n in range(8))), 40)
                assert client.counters["hang"] == 4
                assert len(good.bodies) == 8

    asyncio.run(run())


def test_a_partial_answer_goes_on_from_its_tokens() -> None:
    async def run() -> None:
        script = deque([Behaviour("abort", tokens=4), Behaviour("abort", tokens=0), Behaviour("abort", tokens=3)])
        async with Stub(script=script) as stub, client_of(stub) as client:
            generation = await client.generate(ask())
            assert generation.token_ids == tuple(range(3, 13))  # as if it had never been interrupted
            assert generation.finish is FinishReason.LENGTH
            assert [len(body["input_ids"]) for body in stub.bodies] == [3, 7, 7, 10]
            assert [body["sampling_params"]["max_new_tokens"] for body in stub.bodies] == [10, 6, 6, 3]
            assert client.counters == {"generation_continued": 2}

    asyncio.run(run())


MOE = replace(describe_model(KNOWN["Qwen3-30B-A3B-Base"]), num_layers=2)


def with_routes(stub: Stub, *acts: Behaviour, num_retractions: int = 0) -> None:
    """Each answer names the experts of the positions that it was asked for: position p went to p % 128 and the next seven."""

    def edit(tree: dict[str, Any]) -> None:
        body = stub.bodies[-1]
        assert body["return_routed_experts"] is True
        end = len(body["input_ids"]) + len(tree["output_ids"]) - 1
        positions = np.arange(body["routed_experts_start_len"], end, dtype=np.int32)
        routes = np.broadcast_to((positions[:, None, None] + np.arange(8)) % 128, (len(positions), 2, 8))
        packed = binascii.b2a_base64(routes.astype(np.int32).tobytes(), newline=False)
        tree["meta_info"] |= {"routed_experts": packed.decode(), "num_retractions": num_retractions}

    for act in acts:
        act.edit = edit
    stub.script = deque(acts)


def test_the_experts_of_a_partial_answer_go_on_where_they_ended() -> None:
    async def run() -> None:
        async with Stub() as stub, SGLangClient([stub.url], FAST, vocab_size=100, shape=MOE) as client:
            with_routes(stub, Behaviour("abort", tokens=4), Behaviour("abort", tokens=0), Behaviour())
            generation = await client.generate(ask(routes_from=2))
            assert "routes_of_retracted" not in client.counters
            assert generation.routes is not None
            assert generation.routes[:, 0, 0].tolist() == list(
                range(2, 12)
            )  # 3 + 10 tokens, of which the last has none
            assert generation.routes[:, 1, 7].tolist() == list(range(9, 19))
            assert [body["routed_experts_start_len"] for body in stub.bodies] == [2, 6, 6]
            with_routes(stub, Behaviour())
            stub.script.appendleft(Behaviour("abort", tokens=5))  # taken back, then aborted in the queue: no experts
            assert (await client.generate(ask(routes_from=2))).token_ids == tuple(range(3, 13))
            with_routes(stub, Behaviour(), num_retractions=1)
            await client.generate(ask(routes_from=2))
            assert client.counters["routes_of_retracted"] == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "no routed_experts; start the server with --enable-return-routed-experts"),
        ("AAAA", r"routed_experts that are not \[12, 2, 8\]"),
        (base64.b64encode(np.zeros(12 * 2 * 8, np.int32).tobytes()).decode(), "routed_experts name an expert twice"),
        (base64.b64encode(np.full(12 * 2 * 8, 128, np.int32).tobytes()).decode(), "routed_experts 128 to 128 of 128"),
    ],
)
def test_experts_that_cannot_be_are_refused(value: str | None, said: str) -> None:
    def edit(tree: dict[str, Any]) -> None:
        tree["meta_info"]["routed_experts"] = value

    async def run() -> None:
        async with Stub(script=deque([Behaviour(edit=edit)] * 9)) as stub:
            async with SGLangClient([stub.url], FAST, vocab_size=100, shape=MOE) as client:
                with pytest.raises(GenerationError, match=said):
                    await client.generate(ask(routes_from=0))

    asyncio.run(run())


def test_a_stop_string_over_the_seam_is_found() -> None:
    """`ab` `c`+... with stop `abc`: the server sees only its own output, so the rest of the stop string goes along."""

    def stopped(tree: dict[str, Any]) -> None:
        tree["meta_info"]["finish_reason"] = {"type": "stop", "matched": "c"}

    async def run(text: str) -> tuple[FinishReason, list[list[str]]]:
        script = deque([Behaviour("abort", tokens=2, text="xab"), Behaviour(tokens=1, text=text, edit=stopped)])
        async with Stub(script=script) as stub, client_of(stub) as client:
            generation = await client.generate(ask(stop=("abc",)))
            return generation.finish, [body["sampling_params"]["stop"] for body in stub.bodies]

    assert asyncio.run(run("c")) == (FinishReason.STOP_STRING, [["abc"], ["abc", "c"]])
    # a `c` further on completes nothing: sampling goes on, now without it
    assert asyncio.run(run("zc")) == (FinishReason.LENGTH, [["abc"], ["abc", "c"], ["abc"]])


def test_requests_spread_and_prefixes_stick() -> None:
    async def run() -> None:
        async with Stub(latency_s=0.05) as one, Stub(latency_s=0.05) as two, client_of(one, two) as client:
            await asyncio.gather(
                *(client.generate(ask(route_key=str(n // 8), token_ids=(n // 8 + 1,))) for n in range(128))
            )
            assert abs(len(one.bodies) - len(two.bodies)) <= 16
            prefixes = [{body["input_ids"][0] for body in stub.bodies} for stub in (one, two)]
            assert not prefixes[0] & prefixes[1]  # a group shares one server's cache
            assert len(prefixes[0] | prefixes[1]) == 16

    asyncio.run(run())


def test_a_server_that_is_gone_is_left_alone_until_it_is_back() -> None:
    async def run() -> None:
        async with Stub(version="3") as stale, Stub(version="4") as good, client_of(stale, good) as client:
            client.expect_version(4)
            await asyncio.gather(*(client.generate(ask(route_key=str(n))) for n in range(20)))
            asked = len(stale.bodies)
            assert 1 <= asked <= 10
            await asyncio.gather(*(client.generate(ask(route_key=str(n))) for n in range(20)))
            assert len(stale.bodies) == asked
            stale.version = "4"
            async with asyncio.timeout(10):
                while not client.counters["server_rejoined"]:
                    await asyncio.sleep(0.05)
            await asyncio.gather(*(client.generate(ask(route_key=str(n))) for n in range(100, 120)))
            assert len(stale.bodies) > asked

    asyncio.run(run())


def test_servers_that_all_hold_other_weights_need_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torl_mega.serving.fleet.STALE_LIMIT_S", 1.5)

    async def run() -> None:
        async with Stub(version="3") as one, Stub(version="default") as two, client_of(one, two) as client:
            client.expect_version(4)
            with pytest.raises(StaleServers, match="sync them and go on"):
                await client.generate(ask())
            assert len(one.bodies) == len(two.bodies) == 1  # each was believed once, then left alone

    asyncio.run(run())


@pytest.mark.slow
def test_thousands_at_once_and_two_thousand_a_second() -> None:
    """Client and stub share one core here, so the client alone does better than the figure."""

    async def run() -> float:
        config = ServingConfig(request_timeout_s=60)
        async with Stub(latency_s=0.5) as stub, client_of(stub, config=config) as client:
            begun = time.process_time()
            await asyncio.gather(*(client.generate(ask(route_key=str(n % 64))) for n in range(4096)))
            return 4096 / (time.process_time() - begun)

    assert asyncio.run(run()) > 700


def test_the_stubs_answers_are_the_real_ones(live_server: LiveServer) -> None:
    body = {
        "rid": "recorded", "input_ids": [48, 25, 220], "return_logprob": True,
        "sampling_params": {"max_new_tokens": 3, "temperature": 1.0, "ignore_eos": True},
    }  # fmt: skip

    async def fetch(url: str) -> Any:
        async with aiohttp.ClientSession() as session, session.post(f"{url}/generate", json=body) as answer:
            assert answer.status == 200
            return await answer.json()

    async def run() -> tuple[Any, Any]:
        async with Stub(version="5") as stub:
            return await fetch(live_server.url), await fetch(stub.url)

    def shape(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: shape(value) for key, value in node.items()}
        if isinstance(node, list):
            return [shape(value) for value in node]
        return type(node).__name__

    real, stub = asyncio.run(run())
    real_shape, stub_shape = shape(real), shape(stub)
    assert stub_shape.keys() <= real_shape.keys()
    for key, value in stub_shape["meta_info"].items():
        assert real_shape["meta_info"][key] == value, key
    assert real_shape["output_ids"] == stub_shape["output_ids"]
