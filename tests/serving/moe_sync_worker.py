"""A trainer with spread and cut experts sends its weights to a live server. The ranks are forked anew for every layout.

    moe_sync_worker.py RESULTS.jsonl MODEL_DIR SERVER_URL CASES.json

CASES is a list of layout fields. One line of RESULTS per case: what was sent, and |server - trainer| in log-prob.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

import numpy as np
import torch.distributed as dist
from forked import run_ranks
from layout_cases import Layout
from live_server import write_config
from megatron.core import parallel_state

from torl_mega.config_file import load_config
from torl_mega.serving.probe import prompt_logprobs
from torl_mega.serving.sync.weights import make_weight_sink
from torl_mega.trainer import parallel
from torl_mega.trainer.cpu import backend as cpu_backend
from torl_mega.types import Sample, TrainSample

LIMIT_S = 120.0
IDS = np.array([48, 25, 220, 16, 10, 17, 28, 30, 99, 100, 101, 102, 103])


def sample() -> Sample:
    mask = np.arange(len(IDS)) > 0
    return Sample(IDS, mask, np.zeros(len(IDS), np.float32), np.zeros(len(IDS), np.int32), advantage=1.0)


def run_layout(layout: Layout, number: int, results: Path, model: Path, url: str) -> None:
    config = load_config(model / "tiny.yaml", [*layout.overrides(), "optim.lr=0.01"])
    parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    trainer = MegatronTrainer(config)
    trainer.forward_backward([TrainSample(sample(), None, None, None)])
    trainer.optim_step()  # so that they are not the weights the server started with
    stats: dict[str, Any] = {"unmerged": unmerged(trainer)} if layout.expert_tensor > 1 else {}
    tensors = trainer.weights()
    if parallel.is_rank0():
        stats |= dict(make_weight_sink(config.serving, [url]).update(tensors, version=number))
    collections.deque(tensors, maxlen=0)
    here = trainer.score(sample(), temperature=1.0)
    if parallel.is_rank0():
        there = asyncio.run(prompt_logprobs(url, tuple(IDS.tolist())))
        gap = float(np.abs(here[1:] - np.asarray(there)[1:]).max())
        with results.open("a") as file:
            file.write(json.dumps({"layout": layout.name, "gap": gap, **stats}) + "\n")
    dist.barrier()
    parallel.destroy()


def unmerged(trainer: Any) -> str:
    """What is said when the part that one rank holds of an expert is sent as if it were the whole."""
    from torl_mega.trainer.weights import reshard

    merged = reshard._gathered
    reshard._gathered = lambda shard, group: (
        shard[None] if group is parallel_state.get_expert_tensor_parallel_group() else merged(shard, group)
    )
    try:
        next(name for name, _ in trainer.weights() if ".experts." in name)  # on every rank up to here
    except AssertionError as exc:
        return str(exc)
    finally:
        reshard._gathered = merged
    return "nothing"


def main(results: Path, model: Path, url: str, cases: Path) -> None:
    cpu_backend.install()
    import torl_mega.trainer.megatron_trainer  # noqa: F401 - here, so that no rank has to

    write_config(model, model)
    for number, fields in enumerate(json.loads(cases.read_text()), start=1):
        layout = Layout(**fields)
        run_ranks(layout.world_size, partial(run_layout, layout, number, results, model, url), LIMIT_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
