"""Trajectories on disk: `trajectories/step_NNNNN.jsonl.zst`, one trajectory a line, readable with `zstdcat`.

Contract: a step's file is written atomically. Reading gives back the records that were written, group by group, so a run
can be trained again from its own log. Log-probs are written with 9 significant digits, which is exact for float32.
"""

from __future__ import annotations

import binascii
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from torl_mega.errors import DataError
from torl_mega.run.files import replacing
from torl_mega.types import (
    ExecutionStatus,
    GraderStatus,
    Group,
    Problem,
    Prompt,
    Reward,
    StopReason,
    ToolCall,
    TrainSample,
    Trajectory,
    Turn,
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of a step's file."""

    group: int  # number of its group in the step
    trajectory: Trajectory
    reward: Reward
    advantage: float


def step_path(folder: Path, step: int) -> Path:
    """The file of one step below a run's `trajectories/`."""
    return folder / f"step_{step:05d}.jsonl.zst"


def trainer_path(path: Path) -> Path:
    """Beside a step's file: what the trainer computed for its sampled tokens, in their order."""
    return path.with_name(path.name.removesuffix(".jsonl.zst") + ".trainer.npz")


def write_step(folder: Path, step: int, groups: Sequence[Group], advantages: Sequence[float]) -> Path:
    """Writes all groups of a step. `advantages`: one per trajectory, in group order."""
    path = step_path(folder, step)
    trainer_path(path).unlink(missing_ok=True)  # of what was recorded here before
    scored = [(n, t, r) for n, g in enumerate(groups) for t, r in zip(g.trajectories, g.rewards, strict=True)]
    with replacing(path) as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) as out:
        for (group, trajectory, reward), advantage in zip(scored, advantages, strict=True):
            row = to_row(step, Recorded(group, trajectory, reward, advantage))
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    return path


def write_scores(folder: Path, step: int, samples: Sequence[TrainSample]) -> None:
    """The trainer's log-probs and entropies of a step's sampled tokens, in the order of its file, NaN for those that are not
    trained on. Writes nothing where the trainer did not compute them."""
    logprobs, entropies = [], []
    for item in samples:
        if item.old_logprobs is None or item.entropy is None:
            return
        drawn = item.sample.policy_versions >= 0  # trained on or not
        trained = item.sample.loss_mask[drawn]
        logprobs.append(np.where(trained, item.old_logprobs[drawn], np.nan))
        entropies.append(np.where(trained, item.entropy[drawn], np.nan))
    if logprobs:
        with replacing(trainer_path(step_path(folder, step))) as out:
            flat = np.concatenate(logprobs).astype(np.float32), np.concatenate(entropies).astype(np.float16)
            np.savez(out, logprobs=flat[0], entropy=flat[1])


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON rows of one step. Raises DataError naming file and line."""
    for row in scan_rows(path):
        if isinstance(row, DataError):
            raise row
        yield row


def scan_rows(path: Path) -> Iterator[dict[str, Any] | DataError]:
    """The JSON rows of one step, and in the place of a line that is none an error naming file and line. A file that is cut off
    or no zstd file gives what can be read of it, then the error."""
    try:
        with path.open("rb") as raw:
            for number, line in enumerate(io.BufferedReader(_Whole(raw)), 1):
                try:
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else DataError(f"{path}:{number}: not a JSON object")
                except (ValueError, RecursionError) as exc:
                    yield DataError(f"{path}:{number}: not a JSON line: {exc}")
    except EOFError:
        yield DataError(f"{path}: ends early: it was cut off, or is still being written")
    except (OSError, zstandard.ZstdError) as exc:
        yield DataError(f"{path}: not readable as trajectories: {exc}")


class _Whole(io.RawIOBase):
    """What a zstd file holds. Raises EOFError where it ends in the middle, which zstandard's own reader takes for its end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._ready = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(1 << 17)
            if not packed:
                if not self._frame.eof:
                    raise EOFError
                return 0
            if self._frame.eof:  # another frame follows, as `cat` puts them
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(packed)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def read_groups(path: Path) -> tuple[Group, ...]:
    """The groups of one step, as they were collected. Raises DataError naming file and line."""
    grouped = [list(members) for _, members in itertools.groupby(parse_rows(path, read_rows(path)), lambda r: r.group)]
    return tuple(
        Group(members[0].trajectory.prompt, tuple(r.trajectory for r in members), tuple(r.reward for r in members))
        for members in grouped
    )


def parse_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[Recorded]:
    """The records of a step file's first rows. Raises DataError naming file and line.

    Rows without a group number (older recordings) are numbered by a guess: another problem, or a sample index that does not
    rise, begins a new group.
    """
    before: Recorded | None = None
    for line, row in enumerate(rows, 1):
        try:
            trajectory, reward = trajectory_from_json(row)
            group = int(row["group"]) if "group" in row else guess_group(before, trajectory)
            before = Recorded(group, trajectory, reward, float(row["advantage"]))
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise DataError(f"{path}:{line}: not a trajectory: {type(exc).__name__} {exc}") from None
        yield before


def guess_group(before: Recorded | None, trajectory: Trajectory) -> int:
    """The number of a row's group where it was not recorded, after the row `before`."""
    if before is None:
        return 0
    same = before.trajectory.prompt == trajectory.prompt
    return before.group + (not same or trajectory.sample_index <= before.trajectory.sample_index)


def to_row(step: int, recorded: Recorded) -> dict[str, Any]:
    """One line of a step's file, as JSON values."""
    trajectory, reward = recorded.trajectory, recorded.reward
    problem = trajectory.prompt.problem
    return {
        "step": step,
        "group": recorded.group,
        "problem_id": problem.problem_id,
        **({"extra": dict(problem.extra)} if problem.extra else {}),
        "source": problem.source,
        "problem": problem.problem,
        "answer": problem.answer,
        "sample_index": trajectory.sample_index,
        "stop_reason": trajectory.stop_reason.value,
        "reward": {
            "value": reward.value,
            "correct": reward.correct,
            "status": reward.status.value,
            "extracted": reward.extracted,
            "parts": dict(reward.parts),
        },
        "advantage": recorded.advantage,
        **({"times": [round(t, 4) for t in trajectory.times]} if trajectory.times else {}),
        "prompt_ids": list(trajectory.prompt.token_ids),
        "turns": [_turn_to_json(t) for t in trajectory.turns],
    }


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {
        "text": turn.text,
        "token_ids": list(turn.token_ids),
        "logprobs": [float(f"{x:.9g}") for x in turn.logprobs],
        "policy_versions": list(turn.policy_versions),
        "tool_call": None if turn.tool_call is None else _call_to_json(turn.tool_call),
        **({"more_calls": [_call_to_json(call) for call in turn.more_calls]} if turn.more_calls else {}),
        "observation_ids": list(turn.observation_ids),
        **({} if turn.routes is None else {"routes": _routes_to_json(turn.routes)}),
    }


def _routes_to_json(routes: np.ndarray) -> dict[str, Any]:
    """Experts by number, a byte each where that suffices: {"shape": [n, layers, k], "dtype": "u1", "base64": …}."""
    packed = routes.astype("u1" if routes.size == 0 or routes.max() < 256 else "<u2")
    return {
        "shape": list(routes.shape),
        "dtype": packed.dtype.str.lstrip("|<"),
        "base64": binascii.b2a_base64(packed.tobytes(), newline=False).decode(),
    }


def _routes_from_json(packed: Mapping[str, Any]) -> np.ndarray:
    """[n, layers, k] int32. Raises ValueError, KeyError or TypeError for what `_routes_to_json` does not write."""
    if packed["dtype"] not in ("u1", "u2") or len(packed["shape"]) != 3:
        raise ValueError(
            f"routes of type {packed['dtype']} and shape {packed['shape']}; expected u1 or u2 and three sizes"
        )
    raw = binascii.a2b_base64(packed["base64"])
    return np.frombuffer(raw, "<" + packed["dtype"]).reshape(packed["shape"]).astype(np.int32)


def _call_to_json(call: ToolCall) -> dict[str, Any]:
    return {
        "code": call.code,
        "status": call.status.value,
        "return_code": call.return_code,
        "observation": call.observation,
        "wall_s": call.wall_s,
        **({} if call.tool == "python" else {"tool": call.tool}),
    }


def trajectory_from_json(row: Mapping[str, Any]) -> tuple[Trajectory, Reward]:
    """The records of one row. Raises KeyError, TypeError, ValueError or AttributeError for a row of another form."""
    problem = Problem(row["problem_id"], row["problem"], row["answer"], row["source"], row.get("extra", {}))
    turns = tuple(_turn_from_json(t) for t in row["turns"])
    prompt = Prompt(problem, tuple(row["prompt_ids"]))
    r = row["reward"]
    reward = Reward(r["value"], r["correct"], GraderStatus(r["status"]), r["extracted"], r["parts"])
    ended, times = StopReason(row["stop_reason"]), tuple(row.get("times", ()))
    return Trajectory(prompt, row["sample_index"], turns, ended, times), reward


def _turn_from_json(row: Mapping[str, Any]) -> Turn:
    return Turn(
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        policy_versions=tuple(row["policy_versions"]),
        text=row["text"],
        tool_call=None if row["tool_call"] is None else _call_from_json(row["tool_call"]),
        observation_ids=tuple(row["observation_ids"]),
        more_calls=tuple(_call_from_json(call) for call in row.get("more_calls", ())),
        routes=_routes_from_json(row["routes"]) if "routes" in row else None,
    )


def _call_from_json(row: Mapping[str, Any]) -> ToolCall:
    return ToolCall(
        row["code"],
        ExecutionStatus(row["status"]),
        row["return_code"],
        row["observation"],
        row["wall_s"],
        row.get("tool", "python"),
    )
