"""Episodes, scheduler, samples and recorder with a scripted generator: exact budgets, masks, faults, round trips."""

import asyncio
import dataclasses
import json
import math
import time
import types

import numpy as np
import pytest

from torl_mega.algo.correction import correction_weights, mismatch
from torl_mega.config_file import load_config
from torl_mega.errors import DataError, GenerationError, Preempted, StaleServers
from torl_mega.layout import describe_model
from torl_mega.planner.known_models import KNOWN
from torl_mega.rollout import build
from torl_mega.rollout.episode import Episode, EpisodeSettings, sampling_seed
from torl_mega.rollout.python_tool import Limits, PythonTool
from torl_mega.rollout.recorder import (
    parse_rows,
    read_groups,
    read_rows,
    step_path,
    trainer_path,
    write_scores,
    write_step,
)
from torl_mega.rollout.replay import check_routes
from torl_mega.rollout.samples import make_samples
from torl_mega.rollout.scheduler import EpisodeScheduler, lost_trajectories
from torl_mega.types import (
    ExecutionResult,
    ExecutionStatus,
    FinishReason,
    Generation,
    GraderStatus,
    Group,
    Problem,
    Prompt,
    Reward,
    StopReason,
    TrainSample,
)

SETTINGS = EpisodeSettings(1.0, 1.0, max_response_tokens=100, max_tool_calls=1)
LIMITS = Limits(wall_s=5, cpu_s=5, memory_mb=64, output_bytes=999)
CALL = "```python\nprint(6*7)\n```\n```output"


def encode(text):
    return tuple(ord(c) for c in text)


class Script:
    """A Generator that says what it is told, character by character, and remembers what it was asked."""

    def __init__(self, *texts, version=3):
        self.texts, self.requests, self.version = list(texts), [], version

    async def generate(self, request):
        self.requests.append(request)
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        finish = FinishReason.EOS
        if request.stop and request.stop[0] in text:
            text, finish = text[: text.index(request.stop[0]) + len(request.stop[0])], FinishReason.STOP_STRING
        if len(text) > request.max_new_tokens:
            text, finish = text[: request.max_new_tokens], FinishReason.LENGTH
        n = len(text)
        return Generation(encode(text), tuple(-0.5 * (i + 1) for i in range(n)), (self.version,) * n, text, finish)


class Box:
    """A Sandbox that answers the same to everything."""

    def __init__(self, stdout="42\n", status=ExecutionStatus.OK):
        self.stdout, self.status, self.codes = stdout, status, []

    async def run(self, request):
        self.codes.append(request.code)
        return ExecutionResult(self.status, 0, self.stdout, "", 0.01, 0.01, 5.0, message="down")


class Judge:
    async def score(self, trajectory):
        correct = "\\boxed{42}" in trajectory.turns[-1].text
        value = 1.0 if correct else -1.0
        return Reward(value, correct, GraderStatus.OK, "42" if correct else None, {"answer": value})


PROMPT = Prompt(Problem("arithmetic/1/0", "6*7", "42", "arithmetic"), encode("Q: 6*7=?\nA:"))


def episode(script, box=None, **settings):
    return Episode(script, PythonTool(box or Box(), LIMITS), encode, dataclasses.replace(SETTINGS, **settings))


def run(script, box=None, **settings):
    return asyncio.run(episode(script, box, **settings).run(PROMPT, 0, seed=7))


def test_one_call_and_an_answer():
    script, box = Script(CALL, " so \\boxed{42}"), Box()
    trajectory = run(script, box)
    assert box.codes == ["print(6*7)\n"]
    observation = "\n42\n```\n"
    assert trajectory.response_text == CALL + observation + " so \\boxed{42}"
    assert trajectory.response_ids == encode(trajectory.response_text)
    expected = [True] * len(CALL) + [False] * len(observation) + [True] * len(" so \\boxed{42}")
    assert list(trajectory.loss_mask) == expected
    assert trajectory.stop_reason is StopReason.EOS
    # the second request continues from exactly those ids, without the stop string once C is used up
    assert script.requests[1].token_ids == PROMPT.token_ids + encode(CALL + observation)
    assert script.requests[0].stop == ("```output",)
    assert script.requests[1].stop == ()
    assert script.requests[0].max_new_tokens == 100
    assert script.requests[1].max_new_tokens == 100 - len(CALL) - len(observation)
    assert {r.seed for r in script.requests} == {sampling_seed(7, "arithmetic/1/0", 0, t) for t in (0, 1)}


def test_without_calls_the_stop_string_is_never_set():
    script = Script(CALL + " text goes on")
    trajectory = run(script, max_tool_calls=0)
    assert script.requests[0].stop == ()
    assert trajectory.tool_calls == ()
    assert all(trajectory.loss_mask)


@pytest.mark.parametrize("room", [-1, 0, 1])
def test_an_observation_is_inserted_only_if_it_fits(room):
    observation = "\n42\n```\n"
    budget = len(CALL) + len(observation) + room
    trajectory = run(Script(CALL, "x" * 50), max_response_tokens=budget)
    assert len(trajectory.response_ids) <= budget
    assert trajectory.stop_reason is StopReason.LENGTH
    assert (trajectory.turns[0].observation_ids == ()) == (room < 0)
    assert len(trajectory.turns) == (2 if room == 1 else 1)
    assert trajectory.tool_calls[0].observation == observation  # recorded even when it was not inserted


def test_a_call_without_a_program_runs_nothing():
    box = Box()
    trajectory = run(Script("```output", "\\boxed{1}"), box)
    assert box.codes == []
    assert "no python code block" in trajectory.tool_calls[0].observation


def collect(script, box=None, *, prompts=(PROMPT,), group_size=1, deadline_s=5.0, keep=None):
    with asyncio.Runner() as runner:
        scheduler = EpisodeScheduler(Judge(), runner.run, max_concurrency=8, deadline_s=deadline_s)
        return scheduler.collect(episode(script, box), list(prompts), group_size=group_size, seed=7, keep=keep)


def test_a_failed_trajectory_is_tried_again_then_left_out():
    again = collect(Script(GenerationError("gone"), "\\boxed{42}"))
    assert [len(g.trajectories) for g in again.groups] == [1]
    assert again.faults == {"GenerationError_retry": 1}
    lost = collect(Script(GenerationError("gone"), GenerationError("gone")))
    assert [len(g.trajectories) for g in lost.groups] == [0]
    assert lost_trajectories(lost.faults) == 1


def test_a_sandbox_fault_never_becomes_an_observation():
    collected = collect(Script(CALL, CALL), Box(status=ExecutionStatus.INFRA))
    assert collected.groups[0].trajectories == ()
    assert collected.faults == {"SandboxFault_retry": 1, "SandboxFault_lost": 1}


class OneSlow:
    """Answers at once, except for one problem, which waits until it is cancelled."""

    def __init__(self, slow: str) -> None:
        self.slow, self.cancelled = slow, 0

    async def generate(self, request):
        if request.route_key == self.slow:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        return await Script("\\boxed{42}").generate(request)


def test_with_enough_complete_groups_the_slow_ones_are_cut_off():
    problems = [dataclasses.replace(PROMPT.problem, problem_id=f"p{i}") for i in range(4)]
    generator = OneSlow("p1")
    prompts = [dataclasses.replace(PROMPT, problem=problem) for problem in problems]
    collected = collect(generator, prompts=prompts, group_size=2, keep=3)
    assert [g.prompt.problem.problem_id for g in collected.groups] == ["p0", "p2", "p3"]
    assert all(len(g.trajectories) == 2 for g in collected.groups)
    assert generator.cancelled == 2
    assert collected.faults == {}


def test_a_bug_is_not_taken_for_a_fault():
    with pytest.raises(ExceptionGroup) as error:
        collect(Script(ZeroDivisionError("a bug")))
    assert isinstance(error.value.exceptions[0], ZeroDivisionError)


def test_stale_servers_end_the_whole_collection():
    with pytest.raises(StaleServers, match="sync them"):
        collect(Script(StaleServers("sync them"), "\\boxed{42}"), group_size=2)


class Hanging:
    async def generate(self, request):
        await asyncio.Event().wait()


def test_the_deadline_drops_a_hanging_trajectory():
    collected = collect(Hanging(), deadline_s=0.05)
    assert collected.faults == {"deadline_retry": 1, "deadline_lost": 1}


def test_samples_align_masks_logprobs_and_versions():
    script = Script(CALL, " \\boxed{42}", "\\boxed{41}")
    collected = collect(script, group_size=2)
    samples = make_samples(collected.groups, load_config("conf/base.yaml").algo)
    assert [s.advantage for s in samples] == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-5)
    first, trajectory = samples[0], collected.groups[0].trajectories[0]
    n = len(PROMPT.token_ids)
    assert not first.loss_mask[:n].any()
    assert tuple(first.token_ids) == PROMPT.token_ids + trajectory.response_ids
    assert (first.policy_versions[first.loss_mask] == 3).all()
    assert (first.policy_versions[~first.loss_mask] == -1).all()
    assert (first.rollout_logprobs[~first.loss_mask] == 0).all()
    np.testing.assert_array_equal(first.rollout_logprobs[n:], np.array(trajectory.rollout_logprobs, np.float32))


def test_training_on_observations_is_of_the_same_rollout_and_leaves_the_mismatch_alone():
    algo = load_config("conf/base.yaml", ["algo.train_on_observations=true"]).algo
    collected = collect(Script(CALL, " \\boxed{42}", "\\boxed{41}"), group_size=2)
    plain, both = (make_samples(collected.groups, a)[0] for a in (load_config("conf/base.yaml").algo, algo))
    n = len(PROMPT.token_ids)
    assert both.loss_mask[n:].all()
    assert not both.loss_mask[:n].any()
    np.testing.assert_array_equal(both.sampled, plain.loss_mask)
    assert both.loss_mask.sum() > plain.loss_mask.sum()
    served = both.rollout_logprobs - np.float32(0.25)  # a trainer that is 0.25 below the servers everywhere
    item = TrainSample(both, served, None, None)
    assert mismatch([item])["max_abs_logprob_diff"] == pytest.approx(0.25)
    tis = algo.model_copy(update={"correction": "tis", "correction_veto": 0.5})
    weights = correction_weights(item, tis)
    np.testing.assert_allclose(weights[both.sampled], math.exp(-0.25), rtol=1e-6)
    assert (weights[n:][~both.sampled[n:]] == 1).all()


def test_filters_mask_the_sample_but_keep_the_baseline():
    collected = collect(Script("only words", "\\boxed{42}"), group_size=2)
    algo = load_config("conf/base.yaml", ["algo.void_turns=mask"]).algo
    samples = make_samples(collected.groups, algo)
    by_advantage = sorted(samples, key=lambda s: s.advantage)
    assert not by_advantage[0].loss_mask.any()
    assert by_advantage[1].loss_mask.any()
    assert by_advantage[1].advantage == pytest.approx(math.sqrt(0.5), rel=1e-5)


def test_recorded_groups_come_back_equal(tmp_path):
    collected = collect(Script(CALL, " \\boxed{42}", "\ud800 lone surrogate \x00 <|endoftext|>"), group_size=2)
    write_step(tmp_path, 4, collected.groups, [0.5, -0.5])
    path = step_path(tmp_path, 4)
    again = read_groups(path)
    assert again[0].prompt == collected.groups[0].prompt
    assert again[0].rewards == collected.groups[0].rewards
    assert again[0].trajectories[0] == collected.groups[0].trajectories[0]
    assert [row["advantage"] for row in read_rows(path)] == [0.5, -0.5]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("largest", "dtype"), [(255, "u1"), (299, "u2")])
def test_the_experts_of_tokens_are_recorded_and_trained_on(tmp_path, largest, dtype):
    (group,) = collect(Script(CALL, " \\boxed{42}"), group_size=1).groups
    (trajectory,) = group.trajectories
    rng, known, turns = np.random.default_rng(0), 0, []
    for turn in trajectory.turns:  # the tokens up to the last but one of each turn
        end = len(trajectory.prompt.token_ids) + sum(len(t.token_ids) + len(t.observation_ids) for t in turns)
        end += len(turn.token_ids) - 1
        turns.append(dataclasses.replace(turn, routes=rng.integers(0, largest + 1, (end - known, 3, 2))))
        known = end
    turns[0].routes[0] = largest
    trajectory = dataclasses.replace(trajectory, turns=tuple(turns))
    assert len(turns) == 2
    write_step(tmp_path, 0, [dataclasses.replace(group, trajectories=(trajectory,))], [0.0])
    (again,) = read_groups(step_path(tmp_path, 0))
    assert [row["turns"][0]["routes"]["dtype"] for row in read_rows(step_path(tmp_path, 0))] == [dtype]
    (sample,) = make_samples([again], load_config("conf/base.yaml", ["algo.router_replay=rollout"]).algo)
    assert sample.routes.shape == (len(sample.token_ids), 3, 2)
    assert np.array_equal(sample.routes[:known], np.concatenate([turn.routes for turn in turns]))
    assert known == len(sample.token_ids) - 1
    assert (sample.routes[known:] == -1).all()
    assert make_samples([again], load_config("conf/base.yaml").algo)[0].routes is None


def test_a_recording_without_experts_is_not_replayed():
    collected = collect(Script("only words"), group_size=1)
    with pytest.raises(
        DataError, match=r"algo\.router_replay = rollout, but no experts are recorded for .*; record the run"
    ):
        make_samples(collected.groups, load_config("conf/base.yaml", ["algo.router_replay=rollout"]).algo)


def test_when_attempts_ran_and_what_the_trainer_found_are_recorded(tmp_path):
    before = time.time()
    collected = collect(Script(CALL, " \\boxed{42}", "\\boxed{42}<|endoftext|>"), group_size=2)
    path = write_step(tmp_path, 4, collected.groups, [0.5, -0.5])
    samples = make_samples(collected.groups, load_config("conf/quickstart.yaml", []).algo)
    rows = list(read_rows(path))
    for row, trajectory in zip(rows, read_groups(path)[0].trajectories, strict=True):
        assert row["times"] == list(trajectory.times)
        assert before - 0.001 <= row["times"][0] <= time.time()
        assert len(row["times"]) == 2 + 2 * len(row["turns"])  # begin, generation and calls of each turn, grading
        assert all(0 <= seconds < 60 for seconds in row["times"][1:])
    scored = [TrainSample(s, s.rollout_logprobs - 0.25, np.full(len(s.token_ids), 1.5, np.float32)) for s in samples]
    scored[1] = dataclasses.replace(
        scored[1], sample=dataclasses.replace(samples[1], loss_mask=samples[1].loss_mask & False)
    )
    write_scores(tmp_path, 4, scored)
    with np.load(trainer_path(path)) as file:
        logprobs, entropy = file["logprobs"], file["entropy"]
    sampled = [x for row in rows for turn in row["turns"] for x in turn["logprobs"]]
    first = sum(len(turn["logprobs"]) for turn in rows[0]["turns"])
    np.testing.assert_allclose(logprobs[:first], np.array(sampled[:first]) - 0.25, atol=1e-6)
    assert np.isnan(logprobs[first:]).all()  # not trained on
    assert np.isnan(entropy[first:]).all()
    assert len(logprobs) == len(entropy) == len(sampled)
    assert (entropy[:first] == 1.5).all()
    write_scores(tmp_path, 5, [dataclasses.replace(scored[0], old_logprobs=None, entropy=None)])
    write_step(tmp_path, 4, collected.groups, [0.5, -0.5])  # collected again
    assert list(tmp_path.iterdir()) == [path]


def test_groups_are_told_apart_by_their_number_and_in_older_recordings_by_a_guess(tmp_path):
    import zstandard

    one = collect(Script("\\boxed{42}", "\\boxed{42}", "\\boxed{41}"), group_size=3).groups[0]
    first, second = (Group(one.prompt, one.trajectories[a:b], one.rewards[a:b]) for a, b in ((0, 1), (1, 3)))
    path = write_step(tmp_path, 0, (first, second, one), [0.0] * 6)
    assert read_groups(path) == (first, second, one)
    rows = list(read_rows(path))
    assert [row.pop("group") for row in rows] == [0, 1, 1, 2, 2, 2]
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert read_groups(path) == (one, one)  # sample indices 0 1 2 | 0 1 2


def test_a_damaged_record_is_named_with_its_line(tmp_path):
    import zstandard

    path = step_path(tmp_path, 0)
    path.write_bytes(zstandard.compress(json.dumps({"step": 0}).encode() + b"\n"))
    with pytest.raises(DataError, match=r"step_00000.jsonl.zst:1: not a trajectory"):
        read_groups(path)
    path.write_bytes(b"garbage")
    with pytest.raises(DataError, match="not readable as trajectories"):
        read_groups(path)


def test_a_stop_before_the_servers_are_waited_for_is_not_lost(monkeypatch):
    monkeypatch.setenv("TORL_SERVERS", "http://127.0.0.1:1")
    stop = types.SimpleNamespace(requested=True, on_request=None)
    run = build.AsyncRunner(stop)  # type: ignore[arg-type]
    with pytest.raises(Preempted):
        build.wait_for_servers(load_config("conf/quickstart.yaml"), run)
    run.close()


def moe_trajectory(change=None):
    """An attempt of one turn and the routes of Qwen3-30B-A3B for its tokens, of which `change` makes others."""
    (group,) = collect(Script("only words"), group_size=1).groups
    (trajectory,) = group.trajectories
    (turn,) = trajectory.turns
    rows = len(trajectory.prompt.token_ids) + len(turn.token_ids) - 1
    routes = np.broadcast_to(np.arange(8), (rows, 48, 8)).copy()
    turn = dataclasses.replace(turn, routes=routes if change is None else change(routes))
    return dataclasses.replace(trajectory, turns=(turn,))


DAMAGED = {
    "none": (lambda routes: None, "found none"),
    "another model's": (lambda routes: routes[:, :4], r"found \[\d+, 4, 8\]"),
    "too few": (lambda routes: routes[3:], r"found \[\d+, 48, 8\]"),
    "no expert": (lambda routes: routes + 121, "found numbers 121 to 128"),
    "twice": (lambda routes: routes * 0, "found one of them twice"),
}


@pytest.mark.parametrize(("change", "said"), DAMAGED.values(), ids=DAMAGED)
def test_recorded_experts_that_are_not_the_models_are_refused(change, said, tmp_path):
    shape = describe_model(KNOWN["Qwen3-30B-A3B-Base"])
    check_routes(moe_trajectory(), shape, tmp_path)
    with pytest.raises(
        DataError, match=rf"attempt 0 at .*, turn 0: .*different ones of 128 experts recorded, {said}; replay"
    ):
        check_routes(moe_trajectory(change), shape, tmp_path)


@pytest.mark.parametrize("packed", [{"dtype": "f4", "shape": [1, 2, 2]}, {"dtype": "u1", "shape": [1, 4]}])
def test_recorded_experts_of_another_form_are_named_with_their_line(tmp_path, packed):
    (group,) = collect(Script("only words"), group_size=1).groups
    write_step(tmp_path, 0, [dataclasses.replace(group, trajectories=(moe_trajectory(),))], [0.0])
    (row,) = read_rows(step_path(tmp_path, 0))
    row["turns"][0]["routes"] |= packed
    with pytest.raises(DataError, match=r"1: not a trajectory: ValueError routes of type"):
        list(parse_rows(step_path(tmp_path, 0), [row]))
