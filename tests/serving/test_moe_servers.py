"""Experts and a real server of two tensor ranks: it tells which ones it took, every one that is sent arrives where it belongs, and
what does not is named."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from live_server import LiveServer, write_config
from tiny_model import make_tiny_moe, make_tiny_qwen2_moe

from torl_mega.algo.correction import mismatch
from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import GenerationError, ServerError, WeightSyncError
from torl_mega.layout import describe_model, read_hf_config
from torl_mega.rollout.samples import make_samples
from torl_mega.serving.client import SGLangClient
from torl_mega.serving.generation import RoutesWanted
from torl_mega.serving.probe import prompt_logprobs, prompt_routes
from torl_mega.serving.sglang_server import wait_ready
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.weights import ServerSink, make_transport, make_weight_sink
from torl_mega.trainer import parallel
from torl_mega.trainer.weights.hf_io import HfReader
from torl_mega.trainer.weights.hf_mapping import all_names
from torl_mega.types import (
    GenerationRequest,
    GraderStatus,
    Group,
    Problem,
    Prompt,
    Reward,
    StopReason,
    Trajectory,
    Turn,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parallel"))
from layout_cases import Layout  # noqa: E402
from torchrun import run_python  # noqa: E402

PROBE = (48, 25, 220, 16, 10, 17, 28, 30)
EXPERT = "model.layers.1.mlp.experts."


MODELS = {"qwen3moe": make_tiny_moe, "qwen2moe": make_tiny_qwen2_moe}
CASES = [
    ("qwen3moe", 1),
    pytest.param(("qwen2moe", 1), marks=pytest.mark.slow),
    pytest.param(("qwen3moe", 2), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]} expert ranks")
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    """The family, and the ranks that a server spreads its experts over; at 1 it cuts each of them in two."""
    return request.param


@pytest.fixture(scope="module")
def model(case: tuple[str, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = MODELS[case[0]](tmp_path_factory.mktemp("tiny_moe"))
    write_config(folder, folder)
    return folder


@pytest.fixture(scope="module")
def server(case: tuple[str, int], model: Path, start_server: Callable[..., LiveServer]) -> Iterator[LiveServer]:
    spread = f"serving.expert={case[1]}"
    server = start_server(model / "tiny.yaml", "serving.tensor=2", spread, "algo.router_replay=rollout")
    asyncio.run(wait_ready(server.url, 280, process=server.sidecar, log_path=server.log))
    yield server
    server.sidecar.stop()


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, torch.Tensor]:
    shape = describe_model(read_hf_config(model))
    reader = HfReader(model, shape)
    return {name: reader.get(name) for name in all_names(shape)}


def logprobs(server: LiveServer) -> np.ndarray:
    return np.asarray(asyncio.run(prompt_logprobs(server.url, PROBE)))[1:]


async def two_turns(url: str, config: Config) -> Trajectory:
    """As an episode asks for them, with a tool's words between them."""
    turns: list[Turn] = []
    shape = describe_model(read_hf_config(config.model.path))
    async with SGLangClient([url], config.serving, vocab_size=shape.vocab, shape=shape) as client:
        for observation in ((99, 100, 101), ()):
            so_far = [*PROBE, *(i for turn in turns for i in (*turn.token_ids, *turn.observation_ids))]
            known = sum(len(turn.routes) for turn in turns if turn.routes is not None)
            asked = GenerationRequest(tuple(so_far), 12, 1.0, 1.0, (), len(turns), "p", routes_from=known)
            answer = await client.generate(asked)
            sampled = answer.token_ids, answer.logprobs, answer.policy_versions
            turns.append(Turn(*sampled, answer.text, observation_ids=observation, routes=answer.routes))
    problem = Problem("moe/0", "?", "42", "moe")
    return Trajectory(Prompt(problem, PROBE), 0, tuple(turns), StopReason.LENGTH)


def routes_wanted(model: Path) -> RoutesWanted:
    shape = describe_model(read_hf_config(model))
    assert shape.experts is not None
    return RoutesWanted(0, len(PROBE), shape.num_layers, shape.experts)


def test_routes_of_two_turns_are_those_of_hf_and_are_replayed(server: LiveServer, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = load_config(model / "tiny.yaml", ["algo.router_replay=rollout"])
    trajectory = asyncio.run(two_turns(server.url, config))
    routes = trajectory.routes
    assert routes is not None
    ids = torch.tensor([[*PROBE, *trajectory.response_ids]])
    assert routes.shape == (ids.size(1), 2, 2)
    logits = AutoModelForCausalLM.from_pretrained(model)(ids, output_router_logits=True).router_logits
    wanted = torch.stack([layer.topk(2).indices for layer in logits], 1).numpy()
    assert np.array_equal(np.sort(routes[:-1]), np.sort(wanted[:-1]))
    assert (routes[-1] == -1).all()

    probed = asyncio.run(prompt_routes(server.url, PROBE, routes_wanted(model)))
    assert np.array_equal(np.sort(probed[:-1]), np.sort(wanted[: len(PROBE) - 1]))
    assert (probed[-1] == -1).all()

    reward = Reward(1.0, True, GraderStatus.OK, "42", {"answer": 1.0})
    (sample,) = make_samples([Group(trajectory.prompt, (trajectory,), (reward,))], config.algo)
    parallel.init_distributed(config.parallel, config.trainer)
    try:
        from torl_mega.trainer.megatron_trainer import MegatronTrainer

        trainer = MegatronTrainer(config)
        gaps = [
            mismatch(trainer.old_logprobs([s]))["max_abs_logprob_diff"] for s in (sample, replace(sample, routes=None))
        ]
    finally:
        parallel.destroy()
    assert gaps[0] <= gaps[1] <= 1e-4  # in fp32 both take the same experts


def test_a_server_that_was_not_told_to_keep_routes_is_named(live_server: LiveServer, model: Path) -> None:
    config = load_config(model / "tiny.yaml", ["serving.max_retries=0"])
    said = "no routed_experts; start the server with --enable-return-routed-experts"
    with pytest.raises(GenerationError, match=said):
        asyncio.run(two_turns(live_server.url, config))
    with pytest.raises(ServerError, match=said):
        asyncio.run(prompt_routes(live_server.url, PROBE, routes_wanted(model)))


def test_spread_and_cut_experts_arrive(
    server: LiveServer, model: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    layouts = [Layout(data=2, expert=2), Layout(tensor=2, sequence=True, expert_tensor=2)]
    results, cases = tmp_path / "results.jsonl", tmp_path / "cases.json"
    cases.write_text(json.dumps([asdict(layout) for layout in layouts]))
    run_python(HERE / "moe_sync_worker.py", results, model, server.url, cases, timeout_s=240.0)
    table = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["layout"] for row in table] == [layout.name for layout in layouts]
    assert all(row["gap"] <= 1e-4 for row in table), table
    assert all(row["num_tensors"] == len(weights) for row in table), table
    assert server.version() == str(len(layouts))
    named = "model.layers.0.mlp.experts.0.gate_proj.weight is (16, 64) after it was gathered, the model says (32, 64)"
    assert table[1]["unmerged"] == named


class Swapped:
    """A transport that exchanges two experts after they were hashed: a loader that counts them otherwise."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.in_session = inner.in_session  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def send(self, bucket: Bucket, deadline: object) -> None:
        self._inner.send(Bucket(tuple(swapped(dict(bucket.named)).items())), deadline)  # type: ignore[attr-defined]


def swapped(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts 2 and 5 of one layer in each other's place."""
    other = {EXPERT + "2.": EXPERT + "5.", EXPERT + "5.": EXPERT + "2."}
    found = {name: next((b + name[len(a) :] for a, b in other.items() if name.startswith(a)), name) for name in named}
    return {name: named[source] for name, source in found.items()}


def test_each_planted_fault_is_named(server: LiveServer, model: Path, weights: dict[str, torch.Tensor]) -> None:
    config = load_config(model / "tiny.yaml").serving
    sink = make_weight_sink(config, [server.url])
    lost = {name: w for name, w in weights.items() if name != EXPERT + "3.down_proj.weight"}
    with pytest.raises(
        WeightSyncError, match=r"no tensor was sent that fills its parameter model\.layers\.1\.mlp\.experts\.w2_weight"
    ):
        sink.update(iter(lost.items()), version=90)

    bad = ServerSink(config, [server.url], Swapped(make_transport(config, torch.device("cpu"), {})))
    with pytest.raises(WeightSyncError, match=r"tensor model\.layers\.1\.mlp\.experts\.[25]\..* has checksum"):
        bad.update(iter(weights.items()), version=92)
    assert server.version() == "torn"
    sink.update(iter(weights.items()), version=93)
    assert server.version() == "93"


def test_experts_swapped_before_they_are_hashed_show_in_the_log_probs(
    server: LiveServer, model: Path, weights: dict[str, torch.Tensor]
) -> None:
    sink = make_weight_sink(load_config(model / "tiny.yaml").serving, [server.url])
    sink.update(iter(weights.items()), version=94)
    right = logprobs(server)
    sink.update(iter(swapped(weights).items()), version=95)
    assert np.abs(logprobs(server) - right).max() > 0.01
