"""Proof from the log that a run trained on what it sampled: token in, token out.

Contract: reads trajectories/step_*.jsonl.zst and re-proves for every trajectory that each trained token was sampled, with
a finite log-prob <= 0 and the version of weights that existed then; that each masked token was inserted; that the ids
say what the recorded text says; that an observation's ids are the encoding of that observation, in a chat of the template's
messages around it, and of nothing else. The first violation is named by file, line and field.

Limits: it trusts that the log was written from the records that were trained. A generation that was carried on by another
server in the middle of a multi-byte character is recorded with a replacement character and is reported as a violation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torl_mega.data.prompts import EncodeProblem
from torl_mega.errors import DataError, ToolFault
from torl_mega.rollout.python_tool import STOP
from torl_mega.rollout.recorder import read_rows, trajectory_from_json
from torl_mega.types import StopReason, ToolCall, Trajectory, Turn

Fault = tuple[str, str]  # field, what is wrong with it


class TextCodec(Protocol):
    """The policy's tokenizer; `torl_mega.data.tokenizer.Tokenizer` is one."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> tuple[int, ...]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class ChatFormat(Protocol):
    """How a chat model's turns look; `torl_mega.rollout.chat.ChatTools` is one."""

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    def calls_of(self, turn: str) -> Sequence[object]: ...

    def follow(self, calls: Sequence[ToolCall]) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What a run's texts and ids are held against."""

    codec: TextCodec
    stops: tuple[str, ...] = (STOP,)  # the texts at which a text protocol stops a generation
    chat: ChatFormat | None = None  # the protocol of a chat model
    prompts: EncodeProblem | None = None  # of a chat template; None: a prompt is plain text

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.codec.eos_ids if self.chat is None else self.codec.eos_ids.union(self.chat.end_ids)


@dataclass(frozen=True, slots=True)
class Violation:
    """The place of what is wrong, and what it is."""

    path: Path
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.field}: {self.message}"


@dataclass(frozen=True, slots=True)
class Audit:
    """What was read, up to and including the violation if there is one."""

    num_files: int
    num_trajectories: int
    num_sampled: int  # trained tokens
    num_inserted: int  # masked tokens after the prompt
    violation: Violation | None


def audit_files(paths: Iterable[Path], rules: Rules) -> Audit:
    """Audits whole step files in order and stops at the first violation. Raises nothing for a damaged file: that is a
    violation."""
    files = trajectories = sampled = inserted = 0
    for path in paths:
        files += 1
        line = 0
        try:
            for line, row in enumerate(read_rows(path), 1):
                trajectory, fault = audit_row(row, rules)
                trajectories += 1
                if fault is not None or trajectory is None:
                    field, message = fault or ("row", "not a trajectory")
                    return Audit(files, trajectories, sampled, inserted, Violation(path, line, field, message))
                sampled += sum(trajectory.loss_mask)
                inserted += len(trajectory.loss_mask) - sum(trajectory.loss_mask)
        except DataError as exc:
            return Audit(files, trajectories, sampled, inserted, Violation(path, line + 1, "line", str(exc)))
        if line == 0:
            return Audit(files, trajectories, sampled, inserted, Violation(path, 1, "file", "holds no trajectory"))
    return Audit(files, trajectories, sampled, inserted, None)


def audit_row(row: Mapping[str, Any], rules: Rules) -> tuple[Trajectory | None, Fault | None]:
    """The trajectory of one recorded row and the first thing that is wrong with it."""
    fault = _lengths(row)
    if fault is not None:
        return None, fault
    try:
        trajectory, reward = trajectory_from_json(row)
        step, advantage = int(row["step"]), float(row["advantage"])
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        return None, ("row", f"not a trajectory: {type(exc).__name__} {exc}")
    if not math.isfinite(advantage):
        return trajectory, ("advantage", f"{advantage} is not finite")
    if reward.parts and not math.isclose(sum(reward.parts.values()), reward.value, abs_tol=1e-6):
        return trajectory, ("reward.value", f"{reward.value} is not the sum of its parts {dict(reward.parts)}")
    fault = _prompt(trajectory, rules) or _turns(trajectory, step, rules) or _mask(trajectory)
    return trajectory, fault


def _lengths(row: Mapping[str, Any]) -> Fault | None:
    """One log-prob and one version for every sampled token."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        return "turns", "the trajectory has none"
    for n, turn in enumerate(turns):
        ids = turn.get("token_ids") if isinstance(turn, dict) else None
        if not isinstance(ids, list):
            return f"turns[{n}].token_ids", "missing"
        for name in ("logprobs", "policy_versions"):
            values = turn.get(name)
            if not isinstance(values, list) or len(values) != len(ids):
                return f"turns[{n}].{name}", f"{len(values or ())} for {len(ids)} sampled tokens"
    return None


def _prompt(trajectory: Trajectory, rules: Rules) -> Fault | None:
    ids = trajectory.prompt.token_ids
    if not ids:
        return "prompt_ids", "empty"
    if rules.prompts is not None:
        if tuple(rules.prompts(trajectory.prompt.problem)) != ids:
            return "prompt_ids", "are not what the chat template makes of the problem"
    elif rules.codec.encode(rules.codec.decode(ids)) != ids:
        return "prompt_ids", "are not the encoding of the text they decode to"
    return None


def _turns(trajectory: Trajectory, step: int, rules: Rules) -> Fault | None:
    last = len(trajectory.turns) - 1
    for n, turn in enumerate(trajectory.turns):
        for check in (_sampled, _text, _observation):
            fault = check(turn, step, rules)
            if fault is not None:
                return f"turns[{n}].{fault[0]}", fault[1]
        if n < last and not turn.observation_ids:
            return f"turns[{n}].observation_ids", "empty, but the trajectory goes on"
    closing = trajectory.turns[last]
    if closing.observation_ids and trajectory.stop_reason is not StopReason.LENGTH:
        return "stop_reason", f"{trajectory.stop_reason.value}, but the last tokens were inserted"
    if trajectory.stop_reason is StopReason.EOS and (not closing.token_ids or closing.token_ids[-1] not in rules.ends):
        return "stop_reason", f"eos, but the last sampled token is no EOS token ({sorted(rules.ends)})"
    return None


def _sampled(turn: Turn, step: int, rules: Rules) -> Fault | None:
    for t, (logprob, version) in enumerate(zip(turn.logprobs, turn.policy_versions, strict=True)):
        if not (math.isfinite(logprob) and logprob <= 0):
            return f"logprobs[{t}]", f"{logprob} is not the log of a probability"
        if not 0 <= version <= step:
            return f"policy_versions[{t}]", f"{version} did not exist in step {step}"
    return None


def _text(turn: Turn, step: int, rules: Rules) -> Fault | None:
    """The text is what the ids say, with or without the closing EOS; a stop string may end inside the last token."""
    codec, stops = rules.codec, rules.stops
    decoded = codec.decode(turn.token_ids)
    spoken = turn.token_ids[:-1] if turn.token_ids and turn.token_ids[-1] in rules.ends else turn.token_ids
    if _same(turn.text, decoded) or _same(turn.text, codec.decode(spoken)):
        return None
    stopped = turn.tool_call is not None and turn.text.endswith(stops) and decoded.startswith(turn.text)
    if stopped and len(codec.decode(turn.token_ids[:-1])) < len(turn.text):
        return None
    return "text", f"{_ends(turn.text)} is not what the token ids say: {_ends(decoded)}"


def _same(a: str, b: str) -> bool:
    """Equal but for bytes of an unfinished character at the end, which decoders show or leave out."""
    return a.rstrip("\ufffd") == b.rstrip("\ufffd")


def _ends(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:30]!r}...{text[-30:]!r}"


def _observation(turn: Turn, step: int, rules: Rules) -> Fault | None:
    if turn.tool_call is None:
        return ("observation_ids", "inserted without a tool call") if turn.observation_ids else None
    if rules.chat is not None:
        return _results(turn, rules.chat)
    if not turn.text.endswith(rules.stops):
        return "text", f"a tool ran, but the text does not end in {' or '.join(map(repr, rules.stops))}"
    if turn.more_calls:
        return "more_calls", "a text protocol has one call in a turn"
    if turn.observation_ids and turn.observation_ids != rules.codec.encode(turn.tool_call.observation):
        return "observation_ids", f"are not the encoding of the observation {_ends(turn.tool_call.observation)}"
    return None


def _results(turn: Turn, chat: ChatFormat) -> Fault | None:
    """Every call that the turn's text holds is answered, and the ids are the template's messages with these answers."""
    if not {*turn.token_ids[-1:]} & {*chat.end_ids}:
        closing = " or ".join(map(str, chat.end_ids))
        return "token_ids", f"a tool was called, but the turn is not closed by token {closing}"
    written = len(chat.calls_of(turn.text))
    if written != len(turn.tool_calls):
        return "tool_call", f"{len(turn.tool_calls)} calls for {written} in the text"
    try:
        wanted = chat.follow(turn.tool_calls)
    except ToolFault as exc:
        return "observation_ids", str(exc)
    if turn.observation_ids and turn.observation_ids != wanted:
        return "observation_ids", "are not what the chat template makes of the observations"
    return None


def _mask(trajectory: Trajectory) -> Fault | None:
    """The flat arrays that training sees hold the sampled tokens where the mask is True, the inserted ones elsewhere."""

    pairs = tuple(zip(trajectory.response_ids, trajectory.loss_mask, strict=True))
    trained = tuple(i for i, sampled in pairs if sampled)
    masked = tuple(i for i, sampled in pairs if not sampled)
    if trained != tuple(i for t in trajectory.turns for i in t.token_ids) or masked != tuple(
        i for t in trajectory.turns for i in t.observation_ids
    ):
        return "loss_mask", "does not separate sampled from inserted tokens"
    versions = trajectory.policy_versions
    if any((v >= 0) is not sampled for v, sampled in zip(versions, trajectory.loss_mask, strict=True)):
        return "policy_versions", "a trained token has no version, or an inserted one has"
    return None
