"""The client against a real server, with Hugging Face as the reference."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiohttp
import pytest
import torch
from live_server import LiveServer
from reference import Reference, random_weights
from tiny_model import VOCAB_SIZE

from torl_mega.config import Config
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import GenerationError
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.sync.control import Deadline, call_all
from torl_mega.serving.sync.paused import PausedSink
from torl_mega.serving.sync.weights import make_weight_sink
from torl_mega.types import FinishReason, Generation, GenerationRequest

PROMPT = (48, 25, 220, 16, 10, 17)
STOP = "```output"


def request(**changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "token_ids": PROMPT, "max_new_tokens": 32, "temperature": 1.0, "top_p": 1.0, "stop": (), "seed": 1,
        "route_key": "p",
    }  # fmt: skip
    return GenerationRequest(**(fields | changes))


def with_client(
    config: Config, urls: Sequence[str], work: Callable[[SGLangClient], Coroutine[Any, Any, Any]]
) -> tuple[Any, Counter[str]]:
    async def run() -> tuple[Any, Counter[str]]:
        async with SGLangClient(urls, config.serving, vocab_size=VOCAB_SIZE) as client:
            return await work(client), client.counters

    return asyncio.run(run())


@pytest.fixture
def fresh(live_server: LiveServer, tiny_config: Config, reference: Reference) -> dict[str, torch.Tensor]:
    """Server and reference hold the same weights, version 1."""
    weights = random_weights(reference.original(), 1)
    reference.load(weights)
    make_weight_sink(tiny_config.serving, [live_server.url]).update(iter(weights.items()), version=1)
    return weights


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_references(
    live_server: LiveServer, tiny_config: Config, reference: Reference, temperature: float
) -> None:
    async def work(client: SGLangClient) -> list[Generation]:
        client.expect_version(1)
        requests = [request(temperature=temperature, token_ids=(*PROMPT, n), route_key=str(n)) for n in range(24)]
        return await asyncio.gather(*(client.generate(r) for r in requests))

    generations, counters = with_client(tiny_config, [live_server.url], work)
    assert max(reference.max_gap((*PROMPT, n), g, temperature) for n, g in enumerate(generations)) < 1e-4
    assert {v for g in generations for v in g.policy_versions} == {1}
    assert len({g.token_ids for g in generations}) == 24
    assert not counters


@pytest.mark.usefixtures("fresh")
def test_greedy_is_the_references(live_server: LiveServer, tiny_config: Config, reference: Reference) -> None:
    ask = request(temperature=0.0, max_new_tokens=20)
    generation, _ = with_client(tiny_config, [live_server.url], lambda c: c.generate(ask))
    assert list(generation.token_ids) == reference.greedy(PROMPT, 20)[: len(generation.token_ids)]


@pytest.mark.usefixtures("fresh")
def test_every_finish_reason(live_server: LiveServer, tiny_config: Config, tiny_model: Any) -> None:
    tokenizer = Tokenizer(tiny_model)

    async def work(client: SGLangClient) -> list[Generation]:
        return await asyncio.gather(
            *(client.generate(request(max_new_tokens=400, stop=("e", "9"), route_key=str(n % 7))) for n in range(8)),
            *(client.generate(request(max_new_tokens=400, route_key=str(n % 7))) for n in range(24)),
            client.generate(request(max_new_tokens=3)),
        )

    generations, _ = with_client(tiny_config, [live_server.url], work)
    kinds = Counter(g.finish for g in generations)
    assert kinds[FinishReason.STOP_STRING] >= 6
    assert kinds[FinishReason.EOS] >= 1
    assert kinds[FinishReason.LENGTH] >= 1
    for g in generations:
        assert len(g.token_ids) == len(g.logprobs) == len(g.policy_versions)
        if g.finish is FinishReason.STOP_STRING:
            assert any(stop in tokenizer.decode(g.token_ids[-1:]) for stop in "e9")
            assert any(stop in g.text for stop in "e9")
        elif g.finish is FinishReason.EOS:
            assert g.token_ids[-1] == tokenizer.eos_id
            assert tokenizer.eos_id not in g.token_ids[:-1]
    assert len(generations[-1].token_ids) == 3


@pytest.mark.usefixtures("fresh")
def test_a_token_that_closes_a_turn_ends_a_generation(
    live_server: LiveServer, tiny_config: Config, tiny_model: Any, reference: Reference
) -> None:
    """As EOS does: it is among the ids, with its log-prob, and nothing follows."""
    ends = tuple(range(20, 60))
    asks = [request(token_ids=(*PROMPT, n), max_new_tokens=400, stop_token_ids=ends) for n in range(12)]

    async def work(client: SGLangClient) -> list[Generation]:
        return await asyncio.gather(*(client.generate(ask) for ask in asks))

    generations, _ = with_client(tiny_config, [live_server.url], work)
    closing = {*ends, Tokenizer(tiny_model).eos_id}
    for ask, g in zip(asks, generations, strict=True):
        assert g.finish is FinishReason.EOS
        assert [i for i in g.token_ids if i in closing] == [g.token_ids[-1]]
        assert reference.max_gap(ask.token_ids, g, 1.0) < 1e-4
    assert len({g.token_ids[-1] for g in generations}) > 1


@pytest.mark.usefixtures("fresh")
def test_the_whole_context_fits_and_no_more(live_server: LiveServer, tiny_config: Config) -> None:
    most = tiny_config.max_context_tokens
    rooms = [(most - 1, 1), (1, most - 1), (most - 40, 40)]

    async def work(client: SGLangClient) -> list[Generation]:
        asks = [request(token_ids=(7,) * p, max_new_tokens=n, route_key=str(n)) for p, n in rooms]
        return await asyncio.gather(*(client.generate(ask) for ask in asks))

    generations, _ = with_client(tiny_config, [live_server.url], work)
    for (_, room), g in zip(rooms, generations, strict=True):
        assert len(g.token_ids) == room or g.finish is FinishReason.EOS
    with pytest.raises(GenerationError, match=r"refused the request: .*context length"):
        with_client(tiny_config, [live_server.url], lambda c: c.generate(request(token_ids=(7,) * (most + 20))))


def test_ids_outside_the_vocabulary_never_leave(live_server: LiveServer, tiny_config: Config) -> None:
    for bad in (VOCAB_SIZE, -1, 10**9):
        with pytest.raises(GenerationError, match=f"token id {bad} is outside the vocabulary of {VOCAB_SIZE}"):
            with_client(tiny_config, [live_server.url], lambda c, bad=bad: c.generate(request(token_ids=(1, bad))))
    with pytest.raises(GenerationError, match="without tokens"):
        with_client(tiny_config, [live_server.url], lambda c: c.generate(request(token_ids=())))
    assert live_server.version() is not None  # its scheduler has survived


@pytest.mark.usefixtures("fresh")
def test_a_wrong_version_is_never_used(live_server: LiveServer, tiny_config: Config) -> None:
    config = tiny_config.serving.model_copy(update={"request_timeout_s": 4.0})

    async def work() -> Counter[str]:
        async with SGLangClient([live_server.url], config, vocab_size=VOCAB_SIZE) as client:
            client.expect_version(2)
            with pytest.raises(GenerationError, match=rf"every server was unusable .*{live_server.url}: wrong_version"):
                await client.generate(request())
            client.expect_version(2, oldest=1)
            assert set((await client.generate(request())).policy_versions) == {1}
            return client.counters

    counters = asyncio.run(work())
    assert counters["wrong_version"] == 1
    assert counters["server_rejoined"] == 1


@pytest.mark.usefixtures("fresh")
def test_an_aborted_generation_goes_on_from_its_tokens(
    live_server: LiveServer, tiny_config: Config, reference: Reference
) -> None:
    async def work(client: SGLangClient) -> list[Generation]:
        asks = [request(max_new_tokens=450, token_ids=(*PROMPT, n), route_key=str(n)) for n in range(8)]
        tasks = [asyncio.ensure_future(client.generate(ask)) for ask in asks]
        await running(live_server.url, 8)
        await tell(live_server.url, "/pause_generation", {"mode": "abort"})
        await tell(live_server.url, "/continue_generation", {})
        return await asyncio.gather(*tasks)

    generations, counters = with_client(tiny_config, [live_server.url], work)
    assert counters["generation_continued"] >= 1
    assert counters["generation_retry"] == 0
    for n, g in enumerate(generations):
        assert g.finish is FinishReason.EOS or len(g.token_ids) == 450
        assert reference.max_gap((*PROMPT, n), g) < 1e-4


def test_versions_are_kept_per_token_over_an_update_in_flight(
    live_server: LiveServer, tiny_config: Config, reference: Reference, fresh: dict[str, torch.Tensor]
) -> None:
    # `retract` computes the cached prefix anew, under the new weights
    sink = PausedSink(make_weight_sink(tiny_config.serving, [live_server.url]), [live_server.url], "retract")
    second = random_weights(fresh, 2)

    async def work(client: SGLangClient) -> list[Generation]:
        client.expect_version(2, oldest=1)
        asks = [request(max_new_tokens=450, token_ids=(*PROMPT, n), route_key=str(n)) for n in range(4)]
        tasks = [asyncio.ensure_future(client.generate(ask)) for ask in asks]
        await running(live_server.url, 4)
        await asyncio.to_thread(sink.update, iter(second.items()), version=2)
        return await asyncio.gather(*tasks)

    generations, _ = with_client(tiny_config, [live_server.url], work)
    crossed = 0
    for n, g in enumerate(generations):
        versions = list(g.policy_versions)
        cut = versions.count(1)
        assert versions == [1] * cut + [2] * (len(versions) - cut)
        crossed += 0 < cut < len(versions)
        for weights, rows in ((fresh, slice(0, cut)), (second, slice(cut, None))):
            reference.load(weights)
            expected = reference.logprobs((*PROMPT, n), g.token_ids)[rows]
            assert torch.allclose(expected, torch.tensor(g.logprobs)[rows], atol=1e-4, rtol=0)
    assert crossed >= 1


@pytest.mark.usefixtures("fresh")
def test_prefixes_that_older_weights_computed_are_not_read(
    live_server: LiveServer, tiny_config: Config, reference: Reference
) -> None:
    # `in_place` must not flush: running requests go on with what they have
    sink = make_weight_sink(tiny_config.serving, [live_server.url], flush_cache=False)
    second, prompt = random_weights(reference.original(), 2), PROMPT * 10

    async def work(client: SGLangClient) -> Generation:
        client.expect_version(1)
        await client.generate(request(token_ids=prompt))
        await asyncio.to_thread(PausedSink(sink, [live_server.url], "in_place").update, iter(second.items()), version=2)
        client.expect_version(2)
        return await client.generate(request(token_ids=prompt))

    generation, _ = with_client(tiny_config, [live_server.url], work)
    reference.load(second)
    assert reference.max_gap(prompt, generation) < 1e-4


@pytest.mark.usefixtures("fresh")
def test_a_cancelled_request_leaves_the_server(live_server: LiveServer, tiny_config: Config) -> None:
    async def work(client: SGLangClient) -> None:
        tasks = [asyncio.ensure_future(client.generate(request(max_new_tokens=500, stop=("@@@",)))) for _ in range(8)]
        await running(live_server.url, 8)
        for task in tasks:
            task.cancel()
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
        async with asyncio.timeout(5):
            while await num_running(live_server.url):
                await asyncio.sleep(0.05)

    with_client(tiny_config, [live_server.url], work)


@pytest.mark.usefixtures("fresh")
def test_hundreds_at_once(live_server: LiveServer, tiny_config: Config) -> None:
    async def work(client: SGLangClient) -> list[Generation]:
        asks = [request(max_new_tokens=8, token_ids=(*PROMPT, n % 200), route_key=str(n % 50)) for n in range(600)]
        return await asyncio.gather(*(client.generate(ask) for ask in asks))

    generations, counters = with_client(tiny_config, [live_server.url], work)
    assert len(generations) == 600
    assert not counters


async def tell(url: str, path: str, body: dict[str, str]) -> None:
    await asyncio.to_thread(call_all, [url], path, body, Deadline(20))


async def num_running(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/loads") as answer:
        loads = (await answer.json())["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


async def running(url: str, count: int) -> None:
    """Returns once the server decodes `count` requests."""
    async with asyncio.timeout(20):
        while await num_running(url) < count:
            await asyncio.sleep(0.01)
