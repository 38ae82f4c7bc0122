"""Collecting until the step has signal: groups whose trained answers all earn the same are replaced by those of further prompts.

DAPO's dynamic sampling (arXiv 2503.14476 §3.2), bounded: after `refill_rounds` further collections the step is filled up with
groups without signal, which `make_samples` masks. A prompt whose group was replaced counts as used; one that was never
attempted goes back to the source. Every round has seeds of its own, so a step that is collected again repeats itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torl_mega.types import CollectedGroups, Group


@dataclass(frozen=True, slots=True)
class Refilled:
    kept: tuple[Group, ...]  # what is trained on, in the order of collection
    everything: CollectedGroups  # all that was collected: what a step's metrics are about
    num_rounds: int


def collect_with_signal(
    collect: Callable[[int, int], CollectedGroups],
    has_signal: Callable[[Group], bool],
    *,
    wanted: int,
    most_rounds: int,
) -> Refilled:
    """`collect(n, round)` attempts `n` further prompts; at most `most_rounds` rounds are made."""
    rollouts: list[CollectedGroups] = []
    useful: list[Group] = []
    empty: list[Group] = []
    while len(useful) < wanted and len(rollouts) < most_rounds:
        rollouts.append(collect(wanted - len(useful), len(rollouts)))
        for group in rollouts[-1].groups:
            (useful if has_signal(group) else empty).append(group)
    chosen = {id(group) for group in [*useful[:wanted], *empty[: max(wanted - len(useful), 0)]]}
    everything = together(rollouts)
    return Refilled(tuple(g for g in everything.groups if id(g) in chosen), everything, len(rollouts))


def together(rollouts: Sequence[CollectedGroups]) -> CollectedGroups:
    """All of them as one."""
    faults: Counter[str] = Counter()
    for rollout in rollouts:
        faults.update(rollout.faults)
    groups = tuple(group for rollout in rollouts for group in rollout.groups)
    return CollectedGroups(groups, dict(faults), sum(rollout.wall_s for rollout in rollouts))
