"""What a save costs each rank, what it leaves when the disk is full, and whether Megatron's own gathered states still load.

    save_worker.py RESULTS.json WORK_DIR SMALL_MODEL LARGE_MODEL

The ranks are forked anew for every part; rank 0 writes what all of them found.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from checkpoint_worker import one_step
from forked import run_ranks
from layout_cases import Layout
from layout_worker import LAYOUT_LIMIT_S, config_for

from torl_mega.errors import CheckpointError
from torl_mega.planner.hardware import Assumptions
from torl_mega.planner.memory import trainer_memory
from torl_mega.trainer import parallel
from torl_mega.trainer.cpu import backend as cpu_backend

NO_FILE, TINY_FILE, SMALL_FILE = (
    500,
    20_000,
    100_000,
)  # bytes: the first is less than the state that ranks have in common

MODEL = ("qwen2", True)  # of the states that are gathered


def trainer_for(layout: Layout, model: Path, *overrides: str) -> Any:
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    config = config_for(layout, model, overrides)
    parallel.init_distributed(config.parallel, config.trainer)
    return MegatronTrainer(config)


def report(out: Path, name: str, mine: Any) -> None:
    found = parallel.gather(mine)
    if parallel.is_rank0():
        known = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**known, name: found}))
    parallel.destroy()


# ------------------------------------------------------------------------------------------------ memory


def status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak_growth(act: Any) -> int:
    """Bytes by which this process's resident memory rises above its present value while `act()` runs."""
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier save has freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_bytes("VmRSS")
    act()
    return status_bytes("VmHWM") - before


def state_tensors(trainer: Any) -> list[torch.Tensor]:
    """fp32 weights and Adam's states that this rank holds, in a fixed order."""
    (part,) = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    found = []
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            found += [parameter, state["exp_avg"], state["exp_avg_sq"]]
    return found


def cost(model: Path, path: Path, out: Path) -> None:
    trainer = trainer_for(Layout(data=4), model, "model.dtype=bfloat16")
    own = sum(t.numel() * t.element_size() for t in state_tensors(trainer))
    own += sum(p.numel() * p.element_size() for chunk in trainer.model for p in chunk.parameters())
    trainer.save(path.with_name("step_000001"), extra={})  # starts Megatron's helper, imports what saves need
    plan = trainer_memory(trainer.shape, trainer.config, 4, 100.0, Assumptions(), on_cpu=True)
    mine = {
        "own": own,
        "planned": plan.saved_weights + plan.saved_optimizer,
        "save": peak_growth(lambda: trainer.save(path, extra={})),
        "load": peak_growth(lambda: trainer.load(path)),
        "written": sum(file.stat().st_size for file in path.glob(f"__{parallel.rank()}_*.distcp")),
    }
    report(out, "cost", mine)


# ------------------------------------------------------------------------------------------------ gathered states


def gathered(model: Path, path: Path, out: Path) -> None:
    """Saves what Megatron's own method gathers, and compares what a fresh trainer loads of it with what there was."""
    from torl_mega.trainer.weights import checkpoint, checkpoint_files

    trainer = trainer_for(Layout(data=2), model)
    one_step(trainer, MODEL, 0)
    one_step(trainer, MODEL, 1)
    (part,) = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    metadata = checkpoint._metadata()
    state = checkpoint._training_state(trainer.model, trainer.optimizer, trainer.schedule, metadata, loading=False)
    pieces = state["optimizer"]["param_state"]
    whole = type(part).sharded_param_state_fully_reshardable(part, {"model": state["model"]}, False, metadata)
    state["optimizer"]["param_state"] = whole
    temporary = path.with_name(".gathered.tmp")
    parallel.share(lambda: checkpoint_files.prepare(temporary))
    checkpoint._save_request(temporary, state, metadata).execute_sync()
    checkpoint_files.publish(temporary, path, "{}", trainer.checkpoints._record, None)

    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    fresh = MegatronTrainer(trainer.config)
    fresh.load(path)
    pairs = list(zip(state_tensors(trainer), state_tensors(fresh), strict=True))
    mine = {
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "moved": all(bool(a.any()) for a, _ in pairs),
        "pieces": sum(len(names["param"]) for names in pieces.values()),
        "whole": len(whole),
    }
    report(out, "gathered", mine)


# ------------------------------------------------------------------------------------------------ full disk


def full_disk(model: Path, folder: Path, out: Path, rank: int, limit: int, asynchronous: bool) -> None:
    """Files of `rank` cannot grow beyond `limit` bytes while all ranks save; then they can, and all save again."""
    trainer = trainer_for(Layout(data=2), model, f"checkpoint.async_save={str(asynchronous).lower()}")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    if parallel.rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    said = ""
    try:
        trainer.save(folder / "step_000001", extra={})
        trainer.finish_saves()
    except CheckpointError as exc:
        said = str(exc)
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    dist.barrier()
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    dist.barrier()
    trainer.save(folder / "step_000002", extra={"steps_done": 2})
    trainer.finish_saves()
    mine = {"said": said, "left": left, "later": trainer.load(folder / "step_000002")}
    report(out, f"full disk of rank {rank}, {limit} bytes, {'async' if asynchronous else 'sync'}", mine)


def main(out: Path, work: Path, small: Path, large: Path) -> None:
    cpu_backend.install()
    import torl_mega.trainer.megatron_trainer  # noqa: F401 - here, so that no rank has to

    work.mkdir()
    run_ranks(4, partial(cost, large, work / "cost/step_000002", out), LAYOUT_LIMIT_S)
    run_ranks(2, partial(gathered, small, work / "gathered", out), LAYOUT_LIMIT_S)
    for rank, limit, asynchronous in (
        (0, NO_FILE, False),
        (0, SMALL_FILE, False),
        (1, TINY_FILE, False),
        (1, TINY_FILE, True),
    ):
        folder = work / f"full_{rank}_{limit}_{asynchronous}"
        run_ranks(2, partial(full_disk, small, folder, out, rank, limit, asynchronous), LAYOUT_LIMIT_S)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:5]))
