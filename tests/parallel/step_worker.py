"""The whole RL step in many layouts and recipes against `step_reference` on rank 0. The ranks are forked anew for each layout.

    step_worker.py RESULTS.jsonl WORK_DIR CASES.json

CASES is a list of [layout fields, [case, ...]]. One line of RESULTS per case: the largest differences.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import hf_reference as ref
import step_reference as steps
from forked import run_ranks
from layout_cases import Layout
from layout_worker import LAYOUT_LIMIT_S, config_for, largest

from torl_mega.loop import split_mini_batches
from torl_mega.rollout.samples import make_samples
from torl_mega.trainer import parallel
from torl_mega.trainer.cpu import backend as cpu_backend

MODEL = "qwen2_tied"


def start_model() -> Any:
    return ref.make_model("qwen2", tied=True, layers=4)


def wanted(work: Path, case: str, config: Any) -> dict[str, Any]:
    """The reference's outcome, computed by the first rank 0 that needs it."""
    path = work / f"{case.replace(' ', '_')}.pt"
    if not path.exists():
        runner, start = steps.StepReference(start_model(), config), start_model()
        recorded = [steps.record(n, start, config.rollout.temperature) for n in range(steps.RL_STEPS)]
        for n, groups in enumerate(recorded):
            runner.step(n, groups)
        weights = {k: p.detach().clone() for k, p in runner.model.named_parameters()}
        torch.save({"recorded": recorded, "weights": weights, "norms": runner.norms}, path)
    return torch.load(path, weights_only=False)


def run_case(layout: Layout, case: str, work: Path) -> dict[str, float] | None:
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    config = config_for(layout, work / MODEL, tuple(steps.overrides(case)))
    trainer = MegatronTrainer(config)
    found = parallel.share(lambda: wanted(work, case, config))
    norms = []
    for groups in found["recorded"]:
        scored = trainer.old_logprobs(make_samples(groups, config.algo))
        for mini in split_mini_batches(scored, config.updates_per_step):
            trainer.forward_backward(mini)
            norms.append(trainer.optim_step()["grad_norm"])
    weights = dict(trainer.weights())
    if not parallel.is_rank0():
        return None
    start = dict(start_model().named_parameters())
    return {
        "weights": largest((weights[k], found["weights"][k]) for k in weights),
        "moved": largest((start[k].detach(), found["weights"][k]) for k in weights),
        "grad_norm": max(abs(a - b) / b for a, b in zip(norms, found["norms"], strict=True)),
    }


def run_layout(layout: Layout, cases: list[str], results: Path, work: Path) -> None:
    config = config_for(layout, work / MODEL)
    parallel.init_distributed(config.parallel, config.trainer)
    for case in cases:
        found = run_case(layout, case, work)
        if found is not None:
            with results.open("a") as file:
                file.write(json.dumps({"layout": layout.name, "case": case, **found}) + "\n")
    dist.barrier()
    parallel.destroy()


def main(results: Path, work: Path, cases: Path) -> None:
    cpu_backend.install()
    import torl_mega.trainer.megatron_trainer  # noqa: F401 - here, so that no rank has to

    ref.save_model(start_model(), work / MODEL)
    for fields, names in json.loads(cases.read_text()):
        layout = Layout(**fields)
        run_ranks(layout.world_size, partial(run_layout, layout, names, results, work), LAYOUT_LIMIT_S)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
