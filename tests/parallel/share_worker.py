"""Run by torchrun on two ranks: `share` carries a rollout exactly and in time, and rank 0's exception to every rank."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from torl_mega.config_file import load_config
from torl_mega.errors import DataError
from torl_mega.trainer import parallel
from torl_mega.types import CollectedGroups, Group, Problem, Prompt, Reward, Sample, StopReason, Trajectory, Turn

ROOT = Path(__file__).resolve().parents[2]


class Odd(Exception):
    """Cannot be pickled: its constructor wants two arguments."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"odd {a} {b}")


def make_rollout(count: int, length: int) -> CollectedGroups:
    rng = np.random.default_rng(0)
    groups = []
    for g in range(count // 16):
        prompt = Prompt(Problem(f"p/{g}", "1+1", "2", "p"), tuple(rng.integers(0, 150000, 100).tolist()))
        trajectories = []
        for i in range(16):
            turn = Turn(
                token_ids=tuple(rng.integers(0, 150000, length).tolist()),
                logprobs=tuple(rng.normal(size=length).tolist()),
                policy_versions=(3,) * length,
                text="x" * 20,
            )
            trajectories.append(Trajectory(prompt, i, (turn,), StopReason.EOS))
        rewards = tuple(Reward(1.0, True, "ok", "2", {"answer": 1.0}) for _ in range(16))  # type: ignore[arg-type]
        groups.append(Group(prompt, tuple(trajectories), rewards))
    return CollectedGroups(tuple(groups), {}, 1.5)


def main(out: Path) -> None:
    config = load_config(ROOT / "conf/quickstart.yaml", [])
    parallel.init_distributed(config.parallel.model_copy(update={"data": "auto"}), config.trainer)
    rollout = make_rollout(2048, 2000) if parallel.is_rank0() else None
    dist.barrier()
    start = time.perf_counter()
    got = parallel.share(lambda: rollout)
    dist.barrier()
    seconds = time.perf_counter() - start
    assert got == make_rollout(2048, 2000)
    assert type(got.groups[0].trajectories[0].turns[0].token_ids[0]) is int

    arrays = np.arange(5), np.array([True, False])
    sample = parallel.share(lambda: Sample(arrays[0], arrays[1], arrays[0], arrays[0], 0.5))
    assert (sample.token_ids == arrays[0]).all()
    assert sample.loss_mask.dtype == bool
    assert parallel.share(lambda: None) is None

    def fail() -> None:
        raise DataError("no such file")

    def fail_oddly() -> None:
        raise Odd(1, 2)

    with pytest.raises(DataError, match="no such file"):
        parallel.share(fail)
    with pytest.raises(Exception, match="odd 1 2"):
        parallel.share(fail_oddly)
    with pytest.raises(ValueError, match="from rank 1"):
        parallel.raise_together(ValueError("from rank 1") if not parallel.is_rank0() else None)
    if parallel.is_rank0():
        out.write_text(json.dumps({"seconds": seconds}))
    parallel.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
