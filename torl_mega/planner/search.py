"""Tries every sensible layout for a config on given hardware and ranks those that fit by predicted step time.

Contract: `search` returns override lists that can be pasted behind `torl train CONF`; each was analysed in full.
Limits: context, virtual pipeline and expert tensor parallelism are left as the config has them; tensor sizes stay inside a node.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from torl_mega.config import Config
from torl_mega.errors import ConfigError
from torl_mega.layout import describe_model
from torl_mega.planner.analyse import Analysis, Hardware, Placed, analyse, placed
from torl_mega.planner.hardware import Assumptions
from torl_mega.planner.known_models import hf_config

Overrides = dict[str, object]
PLACES = ("cluster.placement", "cluster.server_nodes", "cluster.server_gpus_per_node", "serving.tensor")
"""What a placement depends on, of the settings that are tried."""


@dataclass(frozen=True, slots=True)
class Candidate:
    overrides: tuple[str, ...]  # a.b=value, only what differs from the config
    analysis: Analysis

    @property
    def step_s(self) -> float:
        assert self.analysis.time is not None
        return self.analysis.time.step_s


def search(
    config: Config,
    hardware: Hardware,
    assume: Assumptions,
    mean_response: int | None = None,
    *,
    nearest: bool = False,
    keep: int = 5,
) -> list[Candidate]:
    """The `keep` fastest layouts that fit, fastest first; of equal ones the nearest to the config first. With `nearest`:
    those that change the fewest settings, and among them the fastest."""
    found: list[tuple[Candidate, Config]] = []
    places: dict[tuple[object, ...], Placed] = {}  # of thousands of nodes: made once, not for every layout
    for overrides in _candidates(config, hardware, _num_experts(config)):
        changed = _changed(config, overrides)
        key = tuple(overrides[name] for name in PLACES)
        if key not in places:
            places[key] = placed(changed, hardware)
        analysis = analyse(changed, hardware, assume, mean_response, where=places[key])
        if analysis.fits:
            texts = [f"{key}={_text(value)}" for key, value in overrides.items() if _get(config, key) != value]
            found.append((Candidate(tuple(texts), analysis), changed))
    if nearest:
        ranked = sorted(found, key=lambda pair: (len(pair[0].overrides), pair[0].step_s))
        return [candidate for candidate, _ in itertools.islice(filter(_is_valid, ranked), keep)]
    ranked = sorted(found, key=lambda pair: (round(pair[0].step_s, 1), len(pair[0].overrides)))
    kept: dict[tuple[object, ...], Candidate] = {}
    for candidate, _ in filter(_is_valid, ranked):
        kept.setdefault(_without_fraction(candidate), candidate)
        if len(kept) == keep:
            break
    return list(kept.values())


def _is_valid(pair: tuple[Candidate, Config]) -> bool:
    """Whether `torl train` takes the changed config: settings that the search leaves alone may want others of it."""
    try:
        Config.model_validate(pair[1].model_dump())
    except ValidationError:
        return False
    return True


def _without_fraction(candidate: Candidate) -> tuple[object, ...]:
    """Layouts that are alike in this differ by a share of memory that costs no time."""
    rest = (text for text in candidate.overrides if not text.startswith("serving.mem_fraction="))
    return (*rest, round(candidate.step_s, 1))


def _candidates(config: Config, hardware: Hardware, num_experts: int = 0) -> Iterator[Overrides]:
    """`num_experts`: of a layer, 0 in a dense model."""
    spreads = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if num_experts and num_experts % n == 0] or [1]
    sizes = [n for n in (1, 2, 4, 8, 16) if n <= hardware.gpus]
    longest = config.max_train_tokens
    budgets = sorted({n for n in (8192, 16384, 32768, config.trainer.micro_batch_tokens) if n >= longest})
    splits: list[Overrides] = [
        {"cluster.placement": "colocated", "cluster.server_nodes": 0, "cluster.server_gpus_per_node": 0}
    ]
    if config.serving.transport != "handles":
        splits += [
            {"cluster.placement": "disaggregated", "cluster.server_nodes": n, "cluster.server_gpus_per_node": 0}
            for n in range(1, hardware.nodes)
            if n <= 8 or n % (hardware.nodes // 8) == 0
        ]
    for split in splits:
        shared = split["cluster.placement"] == "colocated"
        fractions = sorted({0.2, 0.3, 0.4, 0.5, 0.6, 0.7, config.serving.mem_fraction}) if shared else [0.75]
        for tensor in sizes:
            for pipeline, expert in itertools.product((1, 2, 4, 8), spreads):
                for budget in budgets:
                    for recompute in ("none", "full"):
                        for serve in sizes:
                            for fraction in fractions:
                                yield {
                                    **split,
                                    "parallel.tensor": tensor,
                                    "parallel.pipeline": pipeline,
                                    "parallel.expert": expert,
                                    "parallel.data": "auto",
                                    "parallel.sequence": tensor > 1,
                                    "trainer.micro_batch_tokens": budget,
                                    "trainer.recompute": recompute,
                                    "serving.tensor": serve,
                                    "serving.mem_fraction": fraction,
                                }


def _num_experts(config: Config) -> int:
    try:
        experts = describe_model(hf_config(config.model.path)).experts
    except ConfigError:  # which every analysis says
        return 0
    return experts.count if experts else 0


def _changed(config: Config, overrides: Overrides) -> Config:
    """A copy of the config with other values, each valid by itself; whether they go together is asked of the few that are shown."""
    sections: dict[str, dict[str, object]] = {}
    for dotted, value in overrides.items():
        section, field = dotted.split(".")
        sections.setdefault(section, {})[field] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    )


def _get(config: Config, dotted: str) -> object:
    section, field = dotted.split(".")
    return getattr(getattr(config, section), field)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
