"""Where training has come to in its data: walks a file epoch by epoch, an endless stream, or several of them by weight.

A cursor's `state()` is JSON and `restore(state)` goes on with the very next problem; it raises DataError when data, order or seed
are no longer the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from torl_mega.data.problem_files import ProblemFile
from torl_mega.errors import DataError
from torl_mega.types import Problem


class Cursor(Protocol):
    num_problems: int | None  # None: endless

    def advance(self) -> Problem: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class EpochCursor:
    """Walks a file in an order that `seed` and the number of the epoch decide; its state is (epoch, position)."""

    def __init__(self, problems: ProblemFile, kept: np.ndarray, *, seed: int, shuffle: bool) -> None:
        self._problems, self._kept = problems, kept  # kept: [N] row numbers
        self._seed, self._shuffle = seed, shuffle
        self.num_problems: int | None = len(kept)
        self._epoch, self._position = 0, 0
        self._order = self._order_of(0)
        self._identity = f"{problems.digest}:{len(kept)}:{seed if shuffle else 'file order'}"

    def advance(self) -> Problem:
        if self._position == len(self._kept):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        row = int(self._kept[self._order[self._position]])
        self._position += 1
        return self._problems[row]

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, "data": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self._identity:
            raise DataError(
                f"the checkpoint's cursor belongs to other training data or another seed ({state['data']}) than the "
                f"config now names ({self._identity}); restore data.train, data.shuffle and seed, or start a new run name"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._kept))
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._kept))


class StreamCursor:
    """Walks an endless generator; its state is how many problems were drawn."""

    def __init__(self, make: Callable[[], Iterator[Problem]], *, name: str) -> None:
        self._make, self._name = make, name
        self.num_problems: int | None = None
        self._stream, self._position = make(), 0

    def advance(self) -> Problem:
        self._position += 1
        return next(self._stream)

    def state(self) -> dict[str, Any]:
        return {"position": self._position, "data": self._name}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self._name:
            raise DataError(
                f"the checkpoint's cursor belongs to {state['data']}, the config says data.train = {self._name}"
            )
        self._position = int(state["position"])
        self._stream = itertools.islice(self._make(), self._position, None)


class MixedCursor:
    """Draws from several cursors so that after n problems each has given `n * weight / sum of weights`, to less than one.

    Ids are unique in a file only: those of the k-th cursor, from 0, end in `@k` but for the first's.
    """

    def __init__(self, parts: Sequence[Cursor], weights: Sequence[float]) -> None:
        self._parts, self._weights = parts, [weight / sum(weights) for weight in weights]
        self._drawn = [0] * len(parts)
        sizes = [part.num_problems for part in parts]
        self.num_problems = None if None in sizes else sum(size or 0 for size in sizes)

    def advance(self) -> Problem:
        drawn = sum(self._drawn) + 1
        behind = [weight * drawn - own for weight, own in zip(self._weights, self._drawn, strict=True)]
        part = behind.index(max(behind))
        self._drawn[part] += 1
        problem = self._parts[part].advance()
        return dataclasses.replace(problem, problem_id=f"{problem.problem_id}@{part}") if part else problem

    def state(self) -> dict[str, Any]:
        return {"drawn": list(self._drawn), "weights": self._weights, "parts": [part.state() for part in self._parts]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state.get("weights") != self._weights:
            raise DataError(
                f"the checkpoint's cursor belongs to data.train with the shares {state.get('weights')}, the config now has "
                f"{self._weights}; restore data.train or start a new run name"
            )
        for part, its in zip(self._parts, state["parts"], strict=True):
            part.restore(its)
        self._drawn = [int(n) for n in state["drawn"]]
