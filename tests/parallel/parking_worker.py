"""Updates with and without parking between them, on every rank of some layouts: parking_worker.py RESULTS.jsonl WORK_DIR CASES.json

CASES is a list of [layout fields, model.dtype]. One line of RESULTS per case and rank: `plain` and `parked`, digests of metrics,
weights and optimizer state after every step; and of the parked run the bytes of all live tensors by what is held.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import hf_reference as ref
from forked import run_ranks
from layout_cases import Layout
from layout_worker import config_for

from torl_mega.trainer import parallel
from torl_mega.trainer.cpu import backend as cpu_backend

NUM_STEPS = 2
ALL = frozenset({"weights", "gradients", "optimizer"})
HELD = {name: frozenset(name.split(",")) if name else frozenset() for name in ("", "weights", "weights,optimizer")}


def live_bytes() -> int:
    """Of the storages of every tensor that Python can find, but of bytes: those are the buffers in host memory."""
    gc.collect()
    tensors = [
        t
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and t.dtype is not torch.uint8 and t.device.type != "meta"
    ]
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Of a copy: numpy forbids every later change of a storage's size."""
    return tensor.detach().clone().view(-1).view(torch.uint8).numpy().tobytes()


def bits(trainer: Any) -> Iterator[bytes]:
    """Of this rank's weights and of what its optimizer keeps, as Megatron's own state dicts have it."""
    for chunk in trainer.model:
        for parameter in chunk.parameters():
            yield as_bytes(parameter)
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                state = part.optimizer.state[main]
                for tensor in (main.detach(), state["exp_avg"], state["exp_avg_sq"]):
                    yield as_bytes(tensor)


def run(config: Any, work: Path, *, parked: bool) -> dict[str, Any]:
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    others = live_bytes()  # a trainer that Megatron's hooks keep alive
    trainer = MegatronTrainer(config)
    digests, sizes = [], {"all": live_bytes() - others}
    for step in range(NUM_STEPS):
        trainer.hold(ALL)
        scored = trainer.old_logprobs(ref.make_samples(step))
        metrics = {**trainer.forward_backward(scored), **trainer.optim_step()}
        if parked:
            for name, held in HELD.items():
                trainer.hold(held)
                sizes[name] = max(sizes.get(name, 0), live_bytes() - others)
        digest = hashlib.sha256(json.dumps({k: float(v).hex() for k, v in metrics.items()}).encode())
        for _, tensor in trainer.weights():  # as for a sync, with nothing else on the device
            digest.update(b"" if tensor.is_meta else as_bytes(tensor))
        if step == 0:
            trainer.save(work / f"saved_{'parked' if parked else 'plain'}", extra={})
        trainer.hold(ALL)
        for piece in bits(trainer):
            digest.update(piece)
        digests.append(digest.hexdigest())
    trainer.load(work / f"saved_{'parked' if parked else 'plain'}")
    loaded = hashlib.sha256(b"".join(bits(trainer))).hexdigest()
    return {"digests": [*digests, loaded], "sizes": sizes}


def run_layout(layout: Layout, dtype: str, results: Path, work: Path) -> None:
    config = config_for(layout, work / "model", (f"model.dtype={dtype}",))
    parallel.init_distributed(config.parallel, config.trainer)
    folder = work / f"{layout.name.replace(' ', '_')}_{dtype}"
    found = {name: run(config, folder, parked=name == "parked") for name in ("plain", "parked")}
    for rank in range(layout.world_size):
        dist.barrier()
        if rank == parallel.rank():
            with results.open("a") as file:
                file.write(json.dumps({"layout": layout.name, "dtype": dtype, "rank": rank, **found}) + "\n")
    parallel.destroy()


def main(results: Path, work: Path, cases: Path) -> None:
    cpu_backend.install()
    import torl_mega.trainer.megatron_trainer  # noqa: F401 - here, so that no rank has to

    ref.save_model(ref.make_model("qwen2", tied=True, layers=2), work / "model")
    gc.freeze()  # `live_bytes` need not look at what was there before
    for fields, dtype in json.loads(cases.read_text()):
        layout = Layout(**fields)
        run_ranks(layout.world_size, partial(run_layout, layout, dtype, results, work), 240)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
