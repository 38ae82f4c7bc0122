"""Benchmarks: greedy or sampled attempts at fixed problems, scored as in training, told per benchmark with its doubts.

    eval.data ─► load_benchmarks ─► collect (all problems at once) ─► evaluate ─► EvalReport ─► JSON, markdown, transcripts

A benchmark is the rows of one source ("aime24"). Rows that state the same problem are one problem with several samples:
the released test file holds each AIME problem four times. Every oddity of the data (too few problems, repeats, prompts
over the limit) becomes a warning in the report, next to the numbers it touches.

Contract: the same weights, problems and seeds give the same report. Nothing here draws from or moves the training
cursor or its seeds: problems are read on their own, `collect` is handed in. A problem whose prompt is too long counts as
wrong; an attempt lost to the infrastructure is left out and counted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torl_mega.config import BenchmarkConfig, DataConfig, EvalConfig
from torl_mega.data.prompts import Encode, encode_prompts, load_problems
from torl_mega.errors import ConfigError, DataError
from torl_mega.rollout.refill import together
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.types import Group, Problem, Prompt, Reward, Rollout, Trajectory

log = logging.getLogger(__name__)

KNOWN_SIZES = {"aime24": 30, "aime25": 30, "math500": 500, "olympiadbench": 675, "amc23": 40}  # problems of each
PAPER_TABLE_3 = {  # arXiv 2503.23383, accuracy in %; the averages are those of the columns (7B is printed as 62.1)
    "ToRL-1.5B (paper)": {"aime24": 26.7, "aime25": 26.7, "math500": 77.8, "olympiadbench": 44.0, "amc23": 67.5},
    "ToRL-7B (paper)": {"aime24": 43.3, "aime25": 30.0, "math500": 82.2, "olympiadbench": 49.9, "amc23": 75.0},
}
WHERE_FROM = "docs/evaluation.md says where each comes from; eval.data=[] evaluates nothing"
_Z95 = 1.959964


class Collect(Protocol):
    """Attempts at prompts with the current weights; `temperature` 0 is greedy, `top_p` None is training's. Groups may lack
    what was lost to faults."""

    def __call__(
        self, prompts: Sequence[Prompt], *, temperature: float, samples_per_prompt: int, top_p: float | None = None
    ) -> Rollout: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the problems of a benchmark are attempted."""

    temperature: float
    samples_per_problem: int
    top_p: float | None = None

    def changed_by(self, own: BenchmarkConfig | None) -> Sampling:
        """With the settings that a benchmark has of its own."""
        return replace(self, **(own.model_dump(exclude_none=True) if own else {}))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    name: str
    num_problems: int
    num_samples: int  # attempts scored, overlong problems included as wrong ones
    samples_per_problem: int  # attempts at the problem with the fewest
    accuracy: Estimate  # avg@samples_per_problem: mean over problems of the share of correct attempts
    pass_at: Mapping[int, Estimate]  # k -> unbiased pass@k; k is 1, 2, 4, … and samples_per_problem
    code_ratio: float
    pass_ratio: float
    response_length: float
    truncated_ratio: float
    num_grader_timeouts: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EvalReport:
    temperature: float
    benchmarks: tuple[BenchmarkResult, ...]
    overall: Mapping[str, float]  # rollout metrics over all attempts
    faults: Mapping[str, int]
    absent: tuple[str, ...] = ()  # files of known benchmarks that are not there

    @property
    def mean_accuracy(self) -> float:
        """Mean over benchmarks, as the paper's "Avg" column."""
        return sum(b.accuracy.value for b in self.benchmarks) / len(self.benchmarks)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_accuracy": self.mean_accuracy}

    def metrics(self) -> dict[str, float]:
        """Flat numbers for metrics.jsonl: over all attempts, then `<benchmark>/accuracy` and the like."""
        flat = {k: v for k, v in self.overall.items() if "/" not in k} | {"accuracy": self.mean_accuracy}
        for b in self.benchmarks:
            flat[f"{b.name}/accuracy"] = b.accuracy.value
            flat[f"{b.name}/code_ratio"] = b.code_ratio
            flat |= {f"{b.name}/pass_at_{k}": e.value for k, e in b.pass_at.items() if k > 1}
        return flat

    def to_markdown(self, *, name: str) -> str:
        """One row for this model next to the paper's, one row per benchmark with intervals, then the warnings."""
        return (
            "\n".join([*_paper_table(self, name), "", *_detail_table(self), "", *_warning_list(self)]).rstrip() + "\n"
        )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The rows of one source: prompts that fit, and the problems whose prompt does not."""

    name: str
    prompts: tuple[Prompt, ...]
    overlong: tuple[Problem, ...]
    own: BenchmarkConfig | None
    cut_to: int | None  # eval.max_problems where it left rows out


def absent_benchmarks(config: EvalConfig) -> list[str]:
    """The files of `eval.data` that are named after a known benchmark and are not there."""
    missing = [spec for spec in config.data if not Path(spec).exists()]
    return [spec for spec in missing if canonical_name(Path(spec).stem) in KNOWN_SIZES]


def load_benchmarks(config: EvalConfig, data: DataConfig, encode: Encode) -> list[Benchmark]:
    """Reads `eval.data`, templated as in training, one Benchmark per source. Benchmarks that are absent are left out as
    long as one is there. Raises DataError for a bad file."""
    absent = absent_benchmarks(config)
    present = [spec for spec in config.data if spec not in absent]
    if absent and not present:
        raise DataError(f"none of the benchmarks of eval.data is there ({', '.join(absent)}); {WHERE_FROM}")
    by_source: dict[str, list[Problem]] = {}
    cut: set[str] = set()
    for spec in present:
        problems = load_problems(spec, max_problems=config.max_problems)
        for problem in problems:
            by_source.setdefault(canonical_name(problem.source), []).append(problem)
            if len(problems) == config.max_problems:
                cut.add(canonical_name(problem.source))
    strange = sorted(set(config.benchmarks) - set(by_source) - set(KNOWN_SIZES))
    if strange:
        raise ConfigError(
            f"eval.benchmarks.{strange[0]}: eval.data holds no such benchmark; it has {', '.join(by_source)}"
        )
    return [
        _benchmark(name, problems, config, data, encode, cut_to=config.max_problems if name in cut else None)
        for name, problems in by_source.items()
    ]


def canonical_name(source: str) -> str:
    """`AIME_2024`, `aime-24` and `HuggingFaceH4/aime_2024` are all aime24."""
    name = re.sub(r"[^a-z0-9]", "", source.rsplit("/", 1)[-1].lower()).removesuffix("test")
    name = re.sub(r"^(aime|amc)20(\d\d)", r"\1\2", name)
    return {"olympiad": "olympiadbench"}.get(name, name) or source


def _benchmark(
    name: str, problems: list[Problem], config: EvalConfig, data: DataConfig, encode: Encode, *, cut_to: int | None
) -> Benchmark:
    limit = config.max_prompt_tokens or data.max_prompt_tokens
    prompts = encode_prompts(problems, template=data.template, encode=encode, max_prompt_tokens=limit, overlong="drop")
    kept = {prompt.problem.problem_id for prompt in prompts}
    overlong = tuple(p for p in problems if p.problem_id not in kept)
    if overlong and data.overlong_prompts == "error" and not prompts:
        raise ConfigError(
            f"{name}: every prompt is longer than {limit} tokens; raise eval.max_prompt_tokens to evaluate"
        )
    return Benchmark(name, tuple(prompts), overlong, config.benchmarks.get(name), cut_to)


def evaluate(
    benchmarks: Sequence[Benchmark],
    collect: Collect,
    *,
    temperature: float,
    samples_per_problem: int,
    top_p: float | None = None,
    max_tool_calls: int,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    absent: Sequence[str] = (),
) -> EvalReport:
    """Attempts every problem of the benchmarks that are sampled alike at once, and scores them. `on_rollout` sees all of the
    attempts (transcripts)."""
    common = Sampling(temperature, samples_per_problem, top_p)
    samplings = [common.changed_by(b.own) for b in benchmarks]
    rollouts = []
    for s in dict.fromkeys(samplings):
        prompts = [p for b, other in zip(benchmarks, samplings, strict=True) if other == s for p in b.prompts]
        rollouts.append(
            collect(prompts, temperature=s.temperature, samples_per_prompt=s.samples_per_problem, top_p=s.top_p)
        )
    rollout = together(rollouts)
    on_rollout(rollout)
    groups = {group.prompt.problem.problem_id: group for group in rollout.groups}
    results = tuple(
        _score(b, groups, s.samples_per_problem, max_tool_calls) for b, s in zip(benchmarks, samplings, strict=True)
    )
    overall = rollout_metrics(rollout, max_tool_calls=max_tool_calls)
    return EvalReport(temperature, results, overall, dict(rollout.faults), tuple(absent))


def _score(
    benchmark: Benchmark, groups: Mapping[str, Group], samples_per_problem: int, max_tool_calls: int
) -> BenchmarkResult:
    attempts: dict[str, list[bool]] = {}  # problem text -> correct?, over all rows that state it
    own = [groups[p.problem.problem_id] for p in benchmark.prompts if p.problem.problem_id in groups]
    for group in own:
        attempts.setdefault(_key(group.prompt.problem), []).extend(reward.correct for reward in group.rewards)
    for problem in benchmark.overlong:
        attempts.setdefault(_key(problem), []).extend([False] * samples_per_problem)
    scored = [outcomes for outcomes in attempts.values() if outcomes]
    fewest = min((len(outcomes) for outcomes in scored), default=0)
    m = rollout_metrics(Rollout(tuple(own), {}, 0.0), max_tool_calls=max_tool_calls)
    return BenchmarkResult(
        name=benchmark.name,
        num_problems=len(scored),
        num_samples=sum(map(len, scored)),
        samples_per_problem=fewest,
        accuracy=estimate([sum(outcomes) / len(outcomes) for outcomes in scored]),
        pass_at={
            k: estimate([pass_at_k(len(outcomes), sum(outcomes), k) for outcomes in scored]) for k in _steps(fewest)
        },
        code_ratio=m["code_ratio"],
        pass_ratio=m["pass_ratio"],
        response_length=m["response_length"],
        truncated_ratio=m["truncated_ratio"],
        num_grader_timeouts=sum(r.status == "timeout" for group in own for r in group.rewards),
        warnings=tuple(_warnings(benchmark, own, samples_per_problem)),
    )


def _warnings(benchmark: Benchmark, groups: Sequence[Group], samples_per_problem: int) -> list[str]:
    problems = [p.problem for p in benchmark.prompts] + list(benchmark.overlong)
    repeats = Counter(_key(problem) for problem in problems)
    known = KNOWN_SIZES.get(benchmark.name)
    notes = []
    if benchmark.cut_to is not None:
        notes.append(f"only the first rows: eval.max_problems = {benchmark.cut_to}")
    if known is not None and len(repeats) != known:
        notes.append(f"{len(repeats)} of the benchmark's {known} problems; not comparable with published numbers")
    if len(repeats) < len(problems):
        times = sorted(set(repeats.values()))
        how_often = f"{times[0]} times" if len(times) == 1 else f"{times[0]} to {times[-1]} times"
        notes.append(
            f"{len(problems)} rows state {len(repeats)} problems, each {how_often}; counted as further attempts"
        )
    if benchmark.overlong:
        notes.append(f"{len(benchmark.overlong)} problems over eval.max_prompt_tokens; counted as wrong")
    lost = len(benchmark.prompts) * samples_per_problem - sum(len(group.trajectories) for group in groups)
    if lost:
        notes.append(f"{lost} attempts lost to infrastructure faults; left out")
    return notes


def _key(problem: Problem) -> str:
    return " ".join(problem.problem.split())


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of `k` attempts is right, from `c` right ones among `n` >= k (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _steps(n: int) -> list[int]:
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | ({n} if n else set()))


def estimate(shares: Sequence[float]) -> Estimate:
    """Mean of per-problem shares with a 95 % Wilson interval.

    Problems are the independent draws. Where each has several attempts, the interval uses the number of single draws
    that would scatter as the per-problem shares do (never fewer than there are problems).
    """
    n = len(shares)
    if not n:
        return Estimate(0.0, 0.0, 1.0)
    mean = sum(shares) / n
    scatter = sum((s - mean) ** 2 for s in shares) / max(n - 1, 1) / n  # variance of the mean
    draws = max(n, mean * (1 - mean) / scatter) if scatter > 0 else n
    centre = (mean + _Z95**2 / (2 * draws)) / (1 + _Z95**2 / draws)
    half = _Z95 * math.sqrt(mean * (1 - mean) / draws + _Z95**2 / (4 * draws**2)) / (1 + _Z95**2 / draws)
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


# ------------------------------------------------------------------------------------------------ writing it down


def _paper_table(report: EvalReport, name: str) -> list[str]:
    columns = list(KNOWN_SIZES) + [b.name for b in report.benchmarks if b.name not in KNOWN_SIZES]
    ours = {b.name: 100 * b.accuracy.value for b in report.benchmarks}
    doubtful = {b.name for b in report.benchmarks if b.warnings}
    lines = [f"| | {' | '.join(columns)} | avg |", "|---" * (len(columns) + 2) + "|"]
    for model, row in {name: ours, **PAPER_TABLE_3}.items():
        cells = [f"{row[c]:.1f}{'*' if row is ours and c in doubtful else ''}" if c in row else "–" for c in columns]
        lines.append(f"| {model} | {' | '.join(cells)} | {sum(row.values()) / len(row):.1f} |")
    return lines


def _detail_table(report: EvalReport) -> list[str]:
    lines = [
        "| benchmark | problems | attempts | accuracy | 95 % | pass@k | code ratio | pass ratio | tokens | cut off |"
    ]
    lines.append("|---" * 10 + "|")
    for b in report.benchmarks:
        passes = ", ".join(f"@{k} {100 * e.value:.1f}" for k, e in b.pass_at.items())
        lines.append(
            f"| {b.name} | {b.num_problems} | {b.num_samples} | avg@{b.samples_per_problem} {100 * b.accuracy.value:.1f} | "
            f"{100 * b.accuracy.low:.1f}–{100 * b.accuracy.high:.1f} | {passes} | {b.code_ratio:.2f} | {b.pass_ratio:.2f} | "
            f"{b.response_length:.0f} | {b.truncated_ratio:.2f} |"
        )
    return lines


def _warning_list(report: EvalReport) -> list[str]:
    return [f"- \\* {b.name}: {warning}" for b in report.benchmarks for warning in b.warnings] + [
        f"- {canonical_name(Path(spec).stem)}: absent, and not in avg ({spec} is not there); docs/evaluation.md says where "
        "it comes from"
        for spec in report.absent
    ]


def write_transcripts(path: Path, rollout: Rollout) -> None:
    """One line per attempt: problem, what was written and shown, the compared answer and the verdict. Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for group in rollout.groups:
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
                out.write(json.dumps(_transcript(trajectory, reward), ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def _transcript(trajectory: Trajectory, reward: Reward) -> dict[str, Any]:
    problem = trajectory.prompt.problem
    return {
        "problem_id": problem.problem_id,
        "source": problem.source,
        "sample": trajectory.sample_index,
        "problem": problem.problem,
        "gold": problem.answer,
        "extracted": reward.extracted,
        "correct": reward.correct,
        "grader": reward.status.value,
        "stop_reason": trajectory.stop_reason.value,
        "num_tokens": len(trajectory.response_ids),
        "tool_calls": [
            {"status": c.status.value, "code": c.code, "observation": c.observation} for c in trajectory.tool_calls
        ],
        "response": trajectory.response_text,
    }


class Evaluation:
    """The evaluation inside a run: benchmarks read once, each call writes `<step>.json`, `.md` and `.jsonl` to `folder`."""

    def __init__(
        self, config: EvalConfig, data: DataConfig, encode: Encode, folder: Path, *, max_tool_calls: int = 1
    ) -> None:
        self._config = config
        self._folder = folder
        self._max_tool_calls = max_tool_calls
        self._benchmarks = load_benchmarks(config, data, encode)
        self._absent = absent_benchmarks(config)
        if self._absent:
            log.warning("%d of %d benchmarks are not there and are left out: %s; %s", len(self._absent), len(config.data),
                        ", ".join(self._absent), WHERE_FROM)  # fmt: skip

    def run(self, collect: Collect, step: int) -> Mapping[str, float]:
        """Evaluates the current weights; flat metrics, empty when `eval.data` is."""
        report = self.report(collect, name=f"step_{step:05d}")
        return {} if report is None else report.metrics()

    def report(self, collect: Collect, *, name: str) -> EvalReport | None:
        """The full report, written to `folder/<name>.{json,md,jsonl}`; None when `eval.data` is empty."""
        if not self._benchmarks:
            return None
        report = evaluate(
            self._benchmarks,
            collect,
            temperature=self._config.temperature,
            samples_per_problem=self._config.samples_per_problem,
            top_p=self._config.top_p,
            max_tool_calls=self._max_tool_calls,
            on_rollout=lambda rollout: write_transcripts(self._folder / f"{name}.jsonl", rollout),
            absent=self._absent,
        )
        _write(self._folder / f"{name}.json", json.dumps(report.to_json(), indent=2) + "\n")
        _write(self._folder / f"{name}.md", report.to_markdown(name=name))
        return report


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
