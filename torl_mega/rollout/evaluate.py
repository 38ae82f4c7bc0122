"""Benchmarks: greedy or sampled attempts at fixed problems, scored as in training, reported per benchmark, with warnings
about its data.

    eval.data ─► load_benchmarks ─► prompts (all at once) ─► attempts, collected ─► score ─► EvalReport ─► benchmark_table

A benchmark is the rows of one source ("aime24"). Rows that state the same problem are one problem with several samples:
the released test file holds each AIME problem four times. Every oddity of the data (too few problems, repeats, prompts
over the limit) becomes a warning in the report, next to the numbers it touches.

Contract: the same attempts give the same report. Problems are read apart from the training data, so the training cursor
does not move. A problem whose prompt is too long counts as wrong; an attempt lost to the infrastructure is left out and
counted. Nothing is sampled or written here.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torl_mega.config import BenchmarkConfig, DataConfig, EvalConfig
from torl_mega.data.problem_files import is_missing, load_problems
from torl_mega.data.prompts import EncodeProblem, encode_prompts
from torl_mega.errors import ConfigError, DataError
from torl_mega.rollout.statistics import rollout_metrics
from torl_mega.types import CollectedGroups, Group, Problem, Prompt

log = logging.getLogger(__name__)

KNOWN_SIZES = {"aime24": 30, "aime25": 30, "math500": 500, "olympiadbench": 675, "amc23": 40}  # problems of each
WHERE_FROM = "docs/evaluation.md says where each comes from; eval.data=[] evaluates nothing"
_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the problems of a benchmark are attempted."""

    temperature: float  # 0 is greedy
    samples_per_problem: int
    top_p: float | None = None  # None is training's

    def changed_by(self, own: BenchmarkConfig | None) -> Sampling:
        """With the settings that a benchmark has of its own."""
        return replace(self, **(own.model_dump(exclude_none=True) if own else {}))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The scores of one benchmark."""

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
    """The scores of all benchmarks under one policy."""

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
        """Everything, as `eval/step_NNNNN.json` holds it."""
        return {**asdict(self), "mean_accuracy": self.mean_accuracy}

    def metrics(self) -> dict[str, float]:
        """Flat numbers for metrics.jsonl: over all attempts, then `<benchmark>/accuracy` and the like."""
        flat = {k: v for k, v in self.overall.items() if "/" not in k} | {"accuracy": self.mean_accuracy}
        for b in self.benchmarks:
            flat[f"{b.name}/accuracy"] = b.accuracy.value
            flat[f"{b.name}/code_ratio"] = b.code_ratio
            flat |= {f"{b.name}/pass_at_{k}": e.value for k, e in b.pass_at.items() if k > 1}
        return flat


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
    missing = [spec for spec in config.data if is_missing(spec)]
    return [spec for spec in missing if canonical_name(Path(spec).stem) in KNOWN_SIZES]


def load_benchmarks(config: EvalConfig, data: DataConfig, encode: EncodeProblem) -> list[Benchmark]:
    """Reads `eval.data`, templated as in training, one Benchmark per source. Benchmarks that are absent are left out as
    long as one is there. Raises DataError for a bad file."""
    absent = absent_benchmarks(config)
    present = [spec for spec in config.data if spec not in absent]
    if absent and not present:
        raise DataError(f"none of the benchmarks of eval.data is there ({', '.join(absent)}); {WHERE_FROM}")
    if absent:
        left_out = f"{len(absent)} of {len(config.data)} benchmarks are not there and are left out: {', '.join(absent)}"
        log.warning("%s; %s", left_out, WHERE_FROM)
    by_source: dict[str, list[Problem]] = {}
    cut: set[str] = set()
    ids: set[str] = set()
    for number, spec in enumerate(present):
        most = config.max_problems
        problems = load_problems(spec, max_problems=most and most + 1, columns=data.columns)
        is_cut = most is not None and len(problems) > most
        problems = problems[:most]
        problems = [_not_among(ids, problem, number) for problem in problems]
        ids.update(problem.problem_id for problem in problems)
        for problem in problems:
            by_source.setdefault(canonical_name(problem.source), []).append(problem)
            if is_cut:
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


def _not_among(ids: Set[str], problem: Problem, number: int) -> Problem:
    """The problem under an id that no earlier file has; in its own file its id is unique."""
    taken = problem.problem_id in ids
    return replace(problem, problem_id=f"{problem.problem_id}@{number}") if taken else problem


def canonical_name(source: str) -> str:
    """`AIME_2024`, `aime-24` and `HuggingFaceH4/aime_2024` are all aime24."""
    name = re.sub(r"[^a-z0-9]", "", source.rsplit("/", 1)[-1].lower()).removesuffix("test")
    name = re.sub(r"^(aime|amc)20(\d\d)", r"\1\2", name)
    return {"olympiad": "olympiadbench"}.get(name, name) or source


def _benchmark(
    name: str,
    problems: list[Problem],
    config: EvalConfig,
    data: DataConfig,
    encode: EncodeProblem,
    *,
    cut_to: int | None,
) -> Benchmark:
    limit = config.max_prompt_tokens or data.max_prompt_tokens
    prompts = encode_prompts(problems, encode, max_prompt_tokens=limit, overlong="drop")
    kept = {prompt.problem.problem_id for prompt in prompts}
    overlong = tuple(p for p in problems if p.problem_id not in kept)
    if overlong and data.overlong_prompts == "error" and not prompts:
        raise ConfigError(
            f"{name}: every prompt is longer than {limit} tokens; raise eval.max_prompt_tokens to evaluate"
        )
    return Benchmark(name, tuple(prompts), overlong, config.benchmarks.get(name), cut_to)


def samplings(config: EvalConfig, benchmarks: Sequence[Benchmark]) -> list[Sampling]:
    """How each benchmark is attempted: as `eval` says, and as its entry in `eval.benchmarks` says otherwise."""
    common = Sampling(config.temperature, config.samples_per_problem, config.top_p)
    return [common.changed_by(benchmark.own) for benchmark in benchmarks]


def score(
    benchmarks: Sequence[Benchmark],
    collected: CollectedGroups,
    samplings: Sequence[Sampling],
    *,
    temperature: float,
    max_tool_calls: int,
    absent: Sequence[str] = (),
) -> EvalReport:
    """The report on `collected`: the attempts at each prompt of every benchmark, sampled as `samplings` says, but for those
    lost to faults. `max_tool_calls` is C, `absent` the files of known benchmarks that are not there."""
    groups = {group.prompt.problem.problem_id: group for group in collected.groups}
    results = tuple(
        _score(b, groups, s.samples_per_problem, max_tool_calls) for b, s in zip(benchmarks, samplings, strict=True)
    )
    overall = rollout_metrics(collected, max_tool_calls=max_tool_calls)
    return EvalReport(temperature, results, overall, dict(collected.faults), tuple(absent))


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
    m = rollout_metrics(CollectedGroups(tuple(own), {}, 0.0), max_tool_calls=max_tool_calls)
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
