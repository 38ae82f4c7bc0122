"""A checkpoint saved in any layout resumes in any other, and HF -> Megatron -> HF keeps every bit.

    checkpoint_worker.py RESULTS.jsonl WORK_DIR CASES.json

CASES: [[layout fields, ...] to save in, [...] to load in, [family, tied]]. The ranks are forked anew for every layout.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import hf_reference as ref
import torch
import torch.distributed as dist
from forked import run_ranks
from layout_cases import Layout
from layout_worker import LAYOUT_LIMIT_S, aux_of, config_for, largest, reference

from torl_mega.trainer import parallel
from torl_mega.trainer.cpu import backend as cpu_backend
from torl_mega.trainer.weights.hf_io import HfReader
from torl_mega.types import TrainSample


def one_step(trainer: Any, model: tuple[str, bool], n: int) -> None:
    samples = ref.step_samples(*model, n)
    scored = trainer.old_logprobs(samples)
    shifts = ref.noise(n, samples)
    trainer.forward_backward(
        [TrainSample(t.sample, t.old_logprobs + s, t.entropy) for t, s in zip(scored, shifts, strict=True)]
    )
    trainer.optim_step()


def save(layout: Layout, model_path: Path, path: Path, model: tuple[str, bool]) -> None:
    """One rank's part: HF's bits are all there, then two steps and a checkpoint."""
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    config = config_for(layout, model_path, aux_of(*model))
    parallel.init_distributed(config.parallel, config.trainer)
    trainer = MegatronTrainer(config)
    start = dict(trainer.weights())
    if parallel.is_rank0():
        reader = HfReader(model_path, trainer.shape)
        assert all((t == reader.get(name)).all() for name, t in start.items()), f"{layout.name} changes HF's bits"
    one_step(trainer, model, 0)
    one_step(trainer, model, 1)
    trainer.save(path, extra={"steps_done": 2})
    weights = dict(trainer.weights())
    if parallel.is_rank0():
        torch.save(weights, path.parent / "weights.pt")
    dist.barrier()
    parallel.destroy()


def load_all(
    layout: Layout, model_path: Path, checkpoints: list[tuple[Layout, Path]], hf_run: tuple[Path, str, bool], out: Path
) -> None:
    """One rank's part: the third step from each checkpoint, compared with HF's third step."""
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    config = config_for(layout, model_path, aux_of(*hf_run[1:]))
    parallel.init_distributed(config.parallel, config.trainer)
    hf = reference(*hf_run) if parallel.is_rank0() else None
    for saved_in, path in checkpoints:
        trainer = MegatronTrainer(config)
        assert trainer.load(path) == {"steps_done": 2}
        loaded = dict(trainer.weights())
        if hf:
            saved = torch.load(path.parent / "weights.pt")
            assert loaded.keys() == saved.keys()
            assert all(torch.equal(loaded[k], saved[k]) for k in saved), (
                f"{saved_in.name} to {layout.name} changes bits"
            )
        one_step(trainer, hf_run[1:], 2)
        weights = dict(trainer.weights())
        if hf:
            gap = largest((weights[k], hf.weights[k]) for k in weights)
            with out.open("a") as file:
                file.write(json.dumps({"saved": saved_in.name, "loaded": layout.name, "weights": gap}) + "\n")
    dist.barrier()
    parallel.destroy()


def main(results: Path, work: Path, cases: Path) -> None:
    cpu_backend.install()
    import torl_mega.trainer.megatron_trainer  # noqa: F401 - here, so that no rank has to

    savers, loaders, (family, tied) = json.loads(cases.read_text())
    model_path = work / f"{family}_{'tied' if tied else 'untied'}"
    checkpoints = [(Layout(**fields), work / f"ck_{n}" / "step_000002") for n, fields in enumerate(savers)]
    for layout, path in checkpoints:
        run_ranks(layout.world_size, partial(save, layout, model_path, path, (family, tied)), LAYOUT_LIMIT_S)
    for fields in loaders:
        layout = Layout(**fields)
        load = partial(load_all, layout, model_path, checkpoints, (work, family, tied), results)
        run_ranks(layout.world_size, load, LAYOUT_LIMIT_S)
    for _, path in checkpoints:
        shutil.rmtree(path.parent)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
