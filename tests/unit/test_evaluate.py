"""Benchmarks with a policy whose attempts are known: every number of the report worked out by hand or by brute force."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from torl_mega.config import Config, DataConfig, EvalConfig
from torl_mega.config_file import load_config
from torl_mega.data.prompts import PromptSource, plain_prompts
from torl_mega.errors import ConfigError, DataError
from torl_mega.rollout.collector import LiveCollector
from torl_mega.rollout.episode import Episode, EpisodeSettings
from torl_mega.rollout.evaluate import (
    Benchmark,
    EvalReport,
    Sampling,
    canonical_name,
    estimate,
    load_benchmarks,
    pass_at_k,
    score,
)
from torl_mega.run.folder import RunFolder
from torl_mega.types import (
    CollectedGroups,
    ExecutionStatus,
    GraderStatus,
    Group,
    Prompt,
    Reward,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

TORL_TEST = Path(__file__).resolve().parents[3] / "shared/data/torl_test.parquet"


def encode(text: str) -> list[int]:
    return list(text.encode())


def settings(tmp_path: Path, rows: list[dict], **changes) -> tuple[EvalConfig, DataConfig]:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "template": "{problem}", "max_prompt_tokens": 50}
    return EvalConfig.model_validate({"data": (str(path),), "temperature": 0.0, **changes}), DataConfig.model_validate(
        data
    )


class Policy:
    """A scheduler whose attempts' outcome is decided by `right(problem, sample)`; every other attempt runs a program."""

    def __init__(self, right, *, lose: int = 0) -> None:
        self.right, self.lose, self.calls = right, lose, []
        self.top_ps: list[float] = []

    def collect(
        self, episode: Episode, prompts: Sequence[Prompt], *, group_size: int, seed: int, keep: int | None = None
    ) -> CollectedGroups:
        self.calls.append((len(prompts), episode.settings.temperature, group_size, seed))
        self.top_ps.append(episode.settings.top_p)
        return self.attempt(prompts, group_size)

    def attempt(self, prompts: Sequence[Prompt], samples_per_prompt: int) -> CollectedGroups:
        groups, lost = [], self.lose
        for prompt in prompts:
            attempts = []
            for sample in range(samples_per_prompt):
                if lost:
                    lost -= 1
                    continue
                correct = self.right(prompt.problem.problem, sample)
                status = ExecutionStatus.OK if correct else ExecutionStatus.ERROR
                call = ToolCall("1", status, 0, "\n1\n```\n", 0.0) if sample % 2 else None
                turn = Turn((1, 2), (0.0, 0.0), (0, 0), "```python\n1\n```\n" if call else "\\boxed{1}", call)
                reward = Reward(1.0 if correct else -1.0, correct, GraderStatus.OK, "1", {"answer": 1.0})
                attempts.append((Trajectory(prompt, sample, (turn,), StopReason.EOS), reward))
            groups.append(Group(prompt, tuple(t for t, _ in attempts), tuple(r for _, r in attempts)))
        return CollectedGroups(tuple(groups), {"lost": self.lose} if self.lose else {}, 1.0)


def report_on(benchmarks: Sequence[Benchmark], policy: Policy, *, samples: int = 1) -> EvalReport:
    collected = policy.attempt([prompt for b in benchmarks for prompt in b.prompts], samples)
    each = [Sampling(0.7, samples)] * len(benchmarks)
    return score(benchmarks, collected, each, temperature=0.7, max_tool_calls=1)


def collector(policy: Policy, config: Config, folder: Path) -> LiveCollector:
    """The collector of a run, with `policy` in the place of everything that samples."""
    episode = Episode(None, None, encode, EpisodeSettings(1.0, 1.0, 100, 1))  # type: ignore[arg-type]
    source = PromptSource(config.data, plain_prompts(config.data.template, encode), seed=1)
    benchmarks = load_benchmarks(config.eval, config.data, plain_prompts(config.data.template, encode))
    run = RunFolder(folder)
    return LiveCollector(config, run, source, benchmarks, episode, policy, lambda version: None, dict)  # type: ignore[arg-type]


def row(source: str, problem: str) -> dict:
    return {"problem": problem, "answer": "1", "source": source}


def test_accuracy_repeats_and_pass_at_k(tmp_path: Path) -> None:
    rows = [row("AIME_2024", "p0"), row("AIME_2024", "p 1"), row("AIME_2024", "p  1"), row("amc23", "q0")]
    config, data = settings(tmp_path, rows)
    policy = Policy(lambda problem, sample: problem.startswith("p0") or (problem == "p 1" and sample == 0))
    report = report_on(load_benchmarks(config, data, plain_prompts(data.template, encode)), policy, samples=2)
    aime, amc = report.benchmarks
    assert (aime.name, aime.num_problems, aime.num_samples, aime.samples_per_problem) == ("aime24", 2, 6, 2)
    assert aime.accuracy.value == pytest.approx((2 / 2 + 1 / 4) / 2)  # p0: 2 of 2; p1: 1 of the 4 of its two rows
    assert aime.pass_at[1].value == pytest.approx((1 + 1 / 4) / 2)
    assert aime.pass_at[2].value == pytest.approx((1 + (1 - 3 / 6)) / 2)  # p1: 3 of the 6 pairs hold no right attempt
    assert any("2 of the benchmark's 30 problems" in w for w in aime.warnings)
    assert any("3 rows state 2 problems, each 1 to 2 times" in w for w in aime.warnings)
    assert (amc.accuracy.value, amc.code_ratio, amc.pass_ratio) == (0.0, 0.5, 0.0)
    assert report.mean_accuracy == pytest.approx(aime.accuracy.value / 2)
    metrics = report.metrics()
    assert metrics["aime24/accuracy"] == aime.accuracy.value
    assert {"accuracy", "code_ratio", "pass_ratio"} <= set(metrics)


def test_two_files_with_the_same_ids_are_scored_apart(tmp_path: Path) -> None:
    """The policy solves what the first file holds, nothing of the second; the rows have the same numbers and source."""
    files = []
    for name, texts in (("a", ("one", "two")), ("b", ("three", "four"))):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "test.jsonl")
        files[-1].write_text("".join(json.dumps(row("math", text)) + "\n" for text in texts))
    config, data = settings(tmp_path, [row("unused", "x")])
    config = config.model_copy(update={"data": tuple(map(str, files))})
    benchmarks = load_benchmarks(config, data, plain_prompts(data.template, encode))
    report = report_on(benchmarks, Policy(lambda problem, sample: problem in ("one", "two")))
    [math] = report.benchmarks
    assert (math.num_problems, math.accuracy.value) == (4, 0.5)


def test_pass_at_k_is_the_average_over_all_choices_of_k_attempts() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            outcomes = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                picks = list(itertools.combinations(outcomes, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, picks)) / len(picks))


def test_intervals_cover_and_shrink() -> None:
    wide, narrow = estimate([0.0, 1.0] * 5), estimate([0.0, 1.0] * 500)
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * (0.25 / 1000) ** 0.5, rel=0.01)
    assert estimate([1.0] * 30).low == pytest.approx(0.8865, abs=1e-3)  # Wilson at 30 of 30
    assert (estimate([1.0] * 30).high, estimate([0.0] * 30).low) == (1.0, 0.0)
    even = estimate([0.5] * 20)  # many attempts each: no scatter between problems to widen it
    assert even.low < 0.5 < even.high


def test_long_prompts_count_as_wrong_and_lost_attempts_are_left_out(tmp_path: Path) -> None:
    config, data = settings(tmp_path, [row("s", "p" * 60), row("s", "short"), row("s", "other")])
    report = report_on(
        load_benchmarks(config, data, plain_prompts(data.template, encode)), Policy(lambda p, s: True, lose=1)
    )
    [s] = report.benchmarks
    assert s.accuracy.value == pytest.approx(1 / 2)  # one right, one too long, one lost
    assert any("1 problems over eval.max_prompt_tokens" in w for w in s.warnings)
    assert any("1 attempts lost" in w for w in s.warnings)
    assert report.faults == {"lost": 1}


def test_a_benchmark_of_exactly_so_many_rows_is_not_called_cut(tmp_path: Path) -> None:
    for most, noted in ((4, False), (3, True)):
        eval_config, data = settings(tmp_path, [row("math500", f"p{i}") for i in range(4)], max_problems=most)
        [benchmark] = load_benchmarks(eval_config, data, plain_prompts(data.template, encode))
        assert len(benchmark.prompts) == most
        assert (benchmark.cut_to is not None) == noted


def test_a_run_writes_report_table_and_transcripts_and_repeats_exactly(tmp_path: Path) -> None:
    eval_config, data = settings(
        tmp_path, [row("math500", f"p{i}") for i in range(6)], samples_per_problem=2, max_problems=4, temperature=0.25
    )
    config = load_config("conf/base.yaml").model_copy(update={"eval": eval_config, "data": data})
    policy = Policy(lambda p, s: p in ("p0", "p1"))
    written = []
    for name in ("a", "b"):
        metrics = collector(policy, config, tmp_path / name).evaluate(7)
        assert metrics["math500/accuracy"] == pytest.approx(0.5)
        written.append({p.name: p.read_text() for p in sorted((tmp_path / name / "eval").iterdir())})
    assert [call[:3] for call in policy.calls] == [(4, 0.25, 2)] * 2
    assert policy.calls[0] == policy.calls[1]  # the same seed at every evaluation
    assert written[0] == written[1]
    assert set(written[0]) == {"step_00007.json", "step_00007.md", "step_00007.jsonl"}
    report = json.loads(written[0]["step_00007.json"])
    assert report["mean_accuracy"] == pytest.approx(0.5)
    assert "| step_00007 | – | – | 50.0* | – | – | 50.0 |" in written[0]["step_00007.md"]
    assert "| ToRL-7B (paper) | 43.3 | 30.0 | 82.2 | 49.9 | 75.0 | 56.1 |" in written[0]["step_00007.md"]
    assert "eval.max_problems = 4" in written[0]["step_00007.md"]
    lines = [json.loads(line) for line in written[0]["step_00007.jsonl"].splitlines()]
    assert len(lines) == 8
    assert lines[0]["problem"] == "p0"
    assert lines[0]["correct"] is True
    assert lines[1]["tool_calls"][0]["status"] == "ok"


def test_no_benchmarks_no_evaluation_and_the_cursor_is_not_touched(tmp_path: Path) -> None:
    eval_config, data = settings(tmp_path, [row("s", f"p{i}") for i in range(5)])
    config = load_config("conf/base.yaml").model_copy(update={"eval": eval_config, "data": data})
    policy = Policy(lambda p, s: True)
    with_benchmarks = collector(policy, config, tmp_path / "e")
    with_benchmarks.prompts.next(2)
    before = with_benchmarks.state()
    assert with_benchmarks.evaluate(0)["accuracy"] == 1.0
    assert with_benchmarks.state() == before
    none = config.model_copy(update={"eval": EvalConfig.model_validate({"temperature": 0.0})})
    assert collector(policy, none, tmp_path / "n").evaluate(0) == {}
    assert len(policy.calls) == 1
    assert not (tmp_path / "n").exists()


@pytest.mark.skipif(not TORL_TEST.exists(), reason="needs the released test file")
def test_the_released_file_is_told_with_its_doubts(tmp_path: Path) -> None:
    config = EvalConfig.model_validate({"data": (str(TORL_TEST),), "temperature": 0.0})
    data = DataConfig.model_validate({"train": str(TORL_TEST), "template": "torl", "max_prompt_tokens": 4000})
    report = report_on(load_benchmarks(config, data, plain_prompts(data.template, encode)), Policy(lambda p, s: True))
    by_name = {b.name: b for b in report.benchmarks}
    assert {n: (b.num_problems, b.samples_per_problem) for n, b in by_name.items()} == {
        "aime24": (30, 4), "aime25": (30, 4), "math500": (134, 1),
    }  # fmt: skip
    assert by_name["math500"].warnings == (
        "134 of the benchmark's 500 problems; not comparable with published numbers",
    )
    assert by_name["aime24"].warnings == ("120 rows state 30 problems, each 4 times; counted as further attempts",)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("AIME_2024", "aime24"),
        ("aime-25", "aime25"),
        ("HuggingFaceH4/MATH-500", "math500"),
        ("olympiad_bench", "olympiadbench"),
        ("AMC 2023", "amc23"),
        ("arithmetic", "arithmetic"),
    ],
)  # fmt: skip
def test_benchmarks_are_known_under_all_their_names(source: str, name: str) -> None:
    assert canonical_name(source) == name


def test_an_evaluation_has_a_prompt_limit_of_its_own(tmp_path: Path) -> None:
    config, data = settings(tmp_path, [row("amc23", "p" * 60), row("amc23", "p" * 71)], max_prompt_tokens=70)
    (benchmark,) = load_benchmarks(config, data, plain_prompts(data.template, encode))
    assert (len(benchmark.prompts), len(benchmark.overlong)) == (1, 1)


def evaluated(policy: Policy, config: EvalConfig, data: DataConfig, folder: Path) -> tuple[dict, str]:
    """What the collector of a run with these settings leaves on disk: JSON and tables."""
    whole = load_config("conf/quickstart.yaml", [f"data.train={data.train}"])
    run = collector(policy, whole.model_copy(update={"eval": config, "data": data}), folder)
    run.evaluate(0)
    report = folder / "eval/step_00000"
    return json.loads(report.with_suffix(".json").read_text()), report.with_suffix(".md").read_text()


def test_an_absent_benchmark_is_named_and_a_wrong_path_is_refused(tmp_path: Path, caplog) -> None:
    config, data = settings(tmp_path, [row("amc23", "p0")])
    absent = str(tmp_path / "olympiadbench.jsonl")
    both = config.model_copy(update={"data": (*config.data, absent)})
    report, tables = evaluated(Policy(lambda problem, sample: True), both, data, tmp_path)
    assert "1 of 2 benchmarks are not there" in caplog.text
    assert report["mean_accuracy"] == 1.0
    assert f"olympiadbench: absent, and not in avg ({absent} is not there)" in tables
    with pytest.raises(DataError, match="none of the benchmarks"):
        load_benchmarks(config.model_copy(update={"data": (absent,)}), data, plain_prompts(data.template, encode))
    with pytest.raises(DataError, match="no such data file"):
        load_benchmarks(
            config.model_copy(update={"data": (*config.data, str(tmp_path / "typo.jsonl"))}),
            data,
            plain_prompts(data.template, encode),
        )


def test_a_benchmark_may_be_sampled_in_its_own_way(tmp_path: Path) -> None:
    rows = [row("aime24", f"p{i}") for i in range(3)] + [row("amc23", "q"), row("math500", "r")]
    own = {"aime24": {"samples_per_problem": 4, "temperature": 0.6, "top_p": 0.95}, "amc23": {"temperature": 0.0}}
    config, data = settings(tmp_path, rows, benchmarks=own)
    policy = Policy(lambda problem, sample: sample == 0)
    report, _ = evaluated(policy, config, data, tmp_path)
    assert [call[:3] for call in policy.calls] == [(3, 0.6, 4), (2, 0.0, 1)]  # amc23 and math500 are sampled alike
    assert policy.top_ps == [0.95, 1.0]
    assert {b["name"]: (b["samples_per_problem"], b["accuracy"]["value"]) for b in report["benchmarks"]} == {
        "aime24": (4, 0.25), "amc23": (1, 1.0), "math500": (1, 1.0),
    }  # fmt: skip
    strange = config.model_copy(update={"benchmarks": {"amie24": config.benchmarks["aime24"]}})
    with pytest.raises(ConfigError, match=r"eval.benchmarks.amie24: eval.data holds no such benchmark; it has aime24"):
        load_benchmarks(strange, data, plain_prompts(data.template, encode))
