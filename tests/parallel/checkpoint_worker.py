"""Run by torchrun: a checkpoint saved in any layout resumes in any other, and HF -> Megatron -> HF keeps every bit.

checkpoint_worker.py RESULTS.jsonl WORK_DIR CASES.json      CASES: [[layout fields, ...] to save in, [...] to load in, model]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import hf_reference as ref
from layout_cases import Layout
from layout_worker import config_for, largest

from torl_mega.trainer import parallel
from torl_mega.trainer.hf_io import HfReader
from torl_mega.types import TrainSample


def one_step(trainer: Any, n: int) -> None:
    samples = ref.make_samples(n)
    scored = trainer.old_logprobs(samples)
    shifts = ref.noise(n, samples)
    trainer.forward_backward(
        [TrainSample(t.sample, t.old_logprobs + s, t.entropy) for t, s in zip(scored, shifts, strict=True)]
    )
    trainer.optim_step()


def make_trainer(layout: Layout, model_path: Path) -> Any:
    config = config_for(layout, model_path)
    if dist.is_initialized():
        parallel.set_layout(config.parallel, config.trainer)
    else:
        parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    return MegatronTrainer(config)


def main(results: Path, work: Path, cases: Path) -> None:
    savers, loaders, (family, tied) = json.loads(cases.read_text())
    model_path = work / f"{family}_{'tied' if tied else 'untied'}"
    hf: ref.HfRun | None = None
    checkpoints = []
    for n, fields in enumerate(savers):
        layout = Layout(**fields)
        trainer = make_trainer(layout, model_path)
        if parallel.is_rank0():
            hf = hf or ref.HfRun(family, tied)
        start = dict(trainer.weights())
        if parallel.is_rank0():
            reader = HfReader(model_path, trainer.shape)
            assert all((t == reader.get(name)).all() for name, t in start.items()), f"{layout.name} changes HF's bits"
        one_step(trainer, 0)
        one_step(trainer, 1)
        path = work / f"ck_{n}" / "step_000002"
        trainer.save(path, extra={"steps_done": 2})
        checkpoints.append((layout, path))
    for fields in loaders:
        layout = Layout(**fields)
        for saved_in, path in checkpoints:
            trainer = make_trainer(layout, model_path)
            assert trainer.load(path) == {"steps_done": 2}
            one_step(trainer, 2)
            weights = dict(trainer.weights())
            if hf and parallel.is_rank0():
                gap = largest((weights[k], hf.weights[k]) for k in weights)
                with results.open("a") as file:
                    file.write(json.dumps({"saved": saved_in.name, "loaded": layout.name, "weights": gap}) + "\n")
    parallel.barrier()
    if parallel.is_rank0():
        for _, path in checkpoints:
            shutil.rmtree(path.parent)
    parallel.destroy()


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
