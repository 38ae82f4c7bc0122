"""A set of attempts as files that a page can load without a server: one index of columns, and chunks of details.

    view/data/RUN/step_00007.index.js     everything to list, count and filter by: a few bytes an attempt
    view/data/RUN/step_00007.000.js …     tokens, calls and texts of some dozens of attempts each

Contract: a file is one call of `torl.put` with gzipped JSON in base64, so nothing that a model wrote is ever script. Attempts
are written while they are read; no more than a chunk of them is held. Every file is complete at every moment.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from torl_mega.errors import DataError
from torl_mega.view.attempts import ENDS, GRADES, SHORT, STATUSES, Attempt
from torl_mega.view.spans import visible

Put = Callable[[str, str], None]  # (name, text of the script)

FORMAT = 1  # of the data; another one is written anew
ATTEMPTS_A_CHUNK = 128
TOKENS_A_CHUNK = 120_000
FAULTS_NAMED = 50


def script(name: str, value: Any) -> str:
    """The file that hands `value` to the page under `name`."""
    packed = gzip.compress(orjson.dumps(value), 6, mtime=0)  # what is no finite number becomes null
    return f'torl.put("{name}","{base64.b64encode(packed).decode()}");\n'


class SetWriter:
    """Writes one set through `put`. `add` every attempt or fault in order, then `close`, which returns the set's summary."""

    def __init__(self, name: str, put: Put, limit: int | None) -> None:
        self._name, self._put, self._limit = name, put, limit
        self._columns: dict[str, list[Any]] = {}
        self._groups: dict[int, int] = {}  # number of a group -> its place
        self._problems: list[list[Any]] = []
        self._answers: dict[str, int] = {}
        self._starts: list[int] = []
        self._chunk: list[Mapping[str, Any]] = []
        self._prompts: dict[int, dict[str, Any]] = {}  # of the chunk, by place of the group
        self._chunk_tokens = self._num_recorded = 0
        self._faults: list[str] = []
        self._num_faults = 0

    def add(self, item: Attempt | DataError) -> None:
        if isinstance(item, DataError):
            self._num_faults += 1
            if len(self._faults) < FAULTS_NAMED:
                self._faults.append(visible(str(item)))
            return
        self._num_recorded += 1
        if self._limit is None or len(self._columns.get("group", ())) < self._limit:
            self._list(item)

    def add_all(self, items: Iterable[Attempt | DataError]) -> None:
        for item in items:
            self.add(item)

    def _list(self, item: Attempt) -> None:
        place = self._groups.setdefault(item.group, len(self._groups))
        if place == len(self._problems):
            p = item.problem
            self._problems.append([visible(text)[:SHORT] for text in (p.problem_id, p.problem, p.answer, p.source)])
        answer = -1 if item.answer is None else self._place_of(visible(item.answer)[:SHORT])
        for name, value in {"group": place, **item.facts, "answer": answer}.items():
            self._columns.setdefault(name, []).append(value)
        if not self._chunk:
            self._starts.append(len(self._columns["group"]) - 1)
        if place not in self._prompts:
            p = item.problem
            full = {"problem": visible(p.problem), "answer": visible(p.answer)}
            self._prompts[place] = {**full, "prompt": item.prompt, "num_prompt": item.num_prompt}
        self._chunk.append({"group": place, **item.detail})
        self._chunk_tokens += item.num_tokens
        if len(self._chunk) >= ATTEMPTS_A_CHUNK or self._chunk_tokens >= TOKENS_A_CHUNK:
            self._flush()

    def _place_of(self, answer: str) -> int:
        return self._answers.setdefault(answer, len(self._answers))

    def _flush(self) -> None:
        if self._chunk:
            name = f"{self._name}.{len(self._starts) - 1:03d}"
            prompts = [[place, prompt] for place, prompt in self._prompts.items()]
            self._put(name, script(name, {"prompts": prompts, "attempts": self._chunk}))
        self._chunk, self._prompts, self._chunk_tokens = [], {}, 0

    def close(self) -> dict[str, Any]:
        self._flush()
        columns = {name: None if all(v is None for v in values) else values for name, values in self._columns.items()}
        index = {
            "problems": self._problems,
            "columns": columns,
            "answers": list(self._answers),
            "starts": self._starts,
            "names": {"statuses": STATUSES, "grades": GRADES, "ends": ENDS},
            "faults": self._faults,
        }
        name = f"{self._name}.index"
        self._put(name, script(name, index))
        return self._summary()

    def _summary(self) -> dict[str, Any]:
        groups, right = self._columns.get("group", []), self._columns.get("correct", [])
        of_group: list[list[int]] = [[0, 0] for _ in self._problems]
        for place, correct in zip(groups, right, strict=True):
            of_group[place][correct] += 1
        num = len(groups)
        rewards = [r for r in self._columns.get("reward", ()) if r is not None]
        return {
            "attempts": num,
            "recorded": self._num_recorded,
            "groups": len(of_group),
            "solved": sum(not wrong for wrong, _ in of_group),
            "failed": sum(not correct for _, correct in of_group),
            "accuracy": round(sum(right) / num, 6) if num else None,
            "reward": round(sum(rewards) / len(rewards), 6) if rewards else None,
            "called": round(sum(c > 0 for c in self._columns.get("calls", ())) / num, 6) if num else None,
            "length": round(sum(self._columns.get("sampled", ())) / num, 1) if num else None,
            "chunks": len(self._starts),
            "faults": self._num_faults,
            "first_fault": self._faults[0] if self._faults else None,
        }
