"""Problems become prompts: open a data set, template and encode each problem once, hand them out epoch by epoch.

    data.train ─► open_problems ─► cursor ─► PromptSource.next(n) ─► Prompt, Prompt, …
                  (problem_files.py,     (cursors.py: order from seed and epoch; two numbers)
                  checked row by row)

Contract: the same data, seed and cursor give the same prompts on every machine. An epoch hands out each kept row
exactly once; the next epoch follows in the same call where one runs out. Files are read lazily, a group of rows at a
time, so a file may be larger than memory; what is kept for each row is its number.

Limits: a parquet file is shuffled fast only when its row groups are small (`tools/prepare_data.py` writes 1,024 rows a
group); in one with huge row groups every group that is touched is decoded whole. No torch here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torl_mega.config import DataConfig
from torl_mega.data import arithmetic
from torl_mega.data.chat_template import CHAT
from torl_mega.data.cursors import Cursor, EpochCursor, MixedCursor, StreamCursor
from torl_mega.data.problem_files import ProblemFile, arithmetic_seed, open_problems
from torl_mega.data.readers import system_of
from torl_mega.errors import DataError
from torl_mega.types import Problem, Prompt

TORL_PAPER = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
    "User: Please integrate natural language reasoning with programs to solve the problem above, "
    "and put your final answer within \\boxed{}.\n"
    "{problem}\n"
    "Assistant:"
)
TEMPLATES = {"torl": TORL_PAPER + "\n", "torl_paper": TORL_PAPER}

log = logging.getLogger(__name__)

Encode = Callable[[str], Sequence[int]]
EncodeProblem = Callable[[Problem], Sequence[int]]
"""A problem's prompt, in token ids. Raises DataError for one that the template cannot hold."""

KNOWN_ROWS = {"torl_train": 28_740}  # arXiv 2503.23383 §2.1


def render_template(template: str, problem: Problem) -> str:
    """The text the policy sees. `template` is `torl`, `torl_paper` or a text in which every `{problem}` is replaced.

    Only `{problem}` means anything: other braces, as in `\\boxed{}`, stay as they are. Raises DataError without it.
    """
    text = TEMPLATES.get(template, template)
    if "{problem}" not in text:
        raise DataError(
            f"data.template = {template!r} has no {{problem}} in it; use {', '.join(TEMPLATES)} or a text with {{problem}}"
        )
    return text.replace("{problem}", problem.problem)


def plain_prompts(template: str, encode: Encode) -> EncodeProblem:
    """Prompts of a template with `{problem}` in it, see `render_template`."""
    return lambda problem: encode(render_template(template, problem))


def encode_prompts(
    problems: Iterable[Problem], encode: EncodeProblem, *, max_prompt_tokens: int, overlong: str = "error"
) -> list[Prompt]:
    """Prompts for `problems`, in order. A prompt above `max_prompt_tokens` raises DataError (`error`) or is left out (`drop`)."""
    prompts = []
    for problem in problems:
        prompt = _prompt(problem, encode)
        if len(prompt.token_ids) <= max_prompt_tokens:
            prompts.append(prompt)
        elif overlong == "error":
            raise _too_long(prompt, max_prompt_tokens)
    return prompts


class PromptSource:
    """Hands out training prompts. Overlong ones are found (and named or counted) before the first step, not during it.

    `encode` makes a problem's prompt; `seed` decides the order of every epoch.
    """

    def __init__(self, config: DataConfig, encode: EncodeProblem, *, seed: int) -> None:
        self._config = config
        self._encode = encode
        self.files: list[tuple[str, ProblemFile]] = []  # (spec, its problems); generated data is not among them
        self._waiting: list[Problem] = []  # handed out and put back
        self._retired: set[str] = set()  # ids of problems that are not handed out again
        self.num_dropped = 0
        if isinstance(config.train, str):
            self._cursor = self._open(config.train, seed)
        else:
            parts = [self._open(part.path, seed) for part in config.train]
            self._cursor = MixedCursor(parts, [part.weight for part in config.train])
        self.num_problems = self._cursor.num_problems

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts: those that were put back, then the cursor's."""
        prompts: list[Prompt] = []
        while len(prompts) < n:
            problem = self._waiting.pop(0) if self._waiting else self._advance()
            prompt = _prompt(problem, self._encode)
            if len(prompt.token_ids) <= self._config.max_prompt_tokens:
                prompts.append(prompt)
            elif self._config.overlong_prompts == "error":
                raise _too_long(prompt, self._config.max_prompt_tokens)
        return prompts

    def _advance(self) -> Problem:
        """The cursor's next problem that is not retired; when all are, they start over."""
        for _ in range(self.num_problems or 0):
            problem = self._cursor.advance()
            if problem.problem_id not in self._retired:
                return problem
        if self.num_problems:
            log.warning("every problem of %s is retired (data.retire_above); all of them come back", self._config.train)
            self._retired.clear()
        return self._cursor.advance()

    def retire(self, problem_ids: Sequence[str]) -> None:
        """These are mastered and not handed out again. Generated problems do not come back anyway."""
        if self.num_problems is not None:
            self._retired.update(problem_ids)

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """These were not used after all; they come first in the next `next`."""
        self._waiting = [prompt.problem for prompt in prompts] + self._waiting

    def state(self) -> dict[str, Any]:
        """The cursor as JSON: what `restore` needs to go on with the very next prompt."""
        waiting = [dataclasses.asdict(problem) for problem in self._waiting]
        return {**self._cursor.state(), "waiting": waiting, "retired": sorted(self._retired)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state()` was taken. Raises DataError when the data, its order or the seed are no longer the same."""
        self._cursor.restore(state)
        self._waiting = [Problem(**fields) for fields in state["waiting"]]
        self._retired = set(state.get("retired", ()))

    def _open(self, spec: str, seed: int) -> Cursor:
        generated = arithmetic_seed(spec)
        if generated is not None and self._config.source is None:
            return StreamCursor(lambda: arithmetic.problems(generated), name=spec)
        problems = open_problems(spec, self._config.columns, source=self._config.source)
        kept = np.fromiter(self._kept_rows(problems), dtype=np.int64)
        if not len(kept):
            raise DataError(
                f"{spec}: none of its {len(problems)} prompts fits data.max_prompt_tokens = {self._config.max_prompt_tokens}"
            )
        wanted = KNOWN_ROWS.get(Path(spec).stem, len(problems))
        if len(problems) != wanted:
            log.warning("%s has %d problems; the paper trains on %d", spec, len(problems), wanted)
        self.num_dropped += len(problems) - len(kept)
        self.files.append((spec, problems))
        return EpochCursor(problems, kept, seed=seed, shuffle=self._config.shuffle)

    def _kept_rows(self, problems: ProblemFile) -> Iterator[int]:
        config, num_told = self._config, 0
        for row, problem in enumerate(problems):
            num_told += system_of(problem) is not None
            prompt = _prompt(problem, self._encode)
            if len(prompt.token_ids) <= config.max_prompt_tokens:
                yield row
            elif config.overlong_prompts == "error":
                raise _too_long(prompt, config.max_prompt_tokens)
        if num_told and config.template != CHAT:
            log.warning(
                "%d problems bring a system message, which data.template leaves out; data.template=chat has it",
                num_told,
            )


def _prompt(problem: Problem, encode: EncodeProblem) -> Prompt:
    try:
        problem.problem.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{problem.problem_id}: its problem is no Unicode text: {exc.reason} at {exc.start}") from None
    return Prompt(problem=problem, token_ids=tuple(encode(problem)))


def _too_long(prompt: Prompt, limit: int) -> DataError:
    return DataError(
        f"{prompt.problem.problem_id}: its prompt has {len(prompt.token_ids)} tokens, data.max_prompt_tokens is {limit}; "
        f"raise the limit or set data.overlong_prompts=drop"
    )
