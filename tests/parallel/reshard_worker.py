"""Run by torchrun: what `weights()` holds at its peak on every rank, counted tensor by tensor.

reshard_worker.py OUT.json MODEL_DIR LAYOUT.json       OUT: {"peaks": bytes per rank, "parameters": ..., "largest": ...}
"""

from __future__ import annotations

import collections
import json
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))

from layout_cases import Layout
from layout_worker import config_for

from torl_mega.trainer import parallel

SETTLE_S = 0.2


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made under it and that are still alive; `peak` is the most there were."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.changed = threading.Condition(threading.RLock())
        self._known = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.device.type != "meta"
                and tensor.untyped_storage() not in self._known
            ):
                storage = tensor.untyped_storage()
                self._known.add(storage)
                with self.changed:
                    if self.now + storage.nbytes() > self.peak:
                        self._settle(self.now)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _settle(self, held: int) -> None:
        """What gloo's thread is about to drop is no peak."""
        self.changed.wait_for(lambda: self.now < held, SETTLE_S)

    def _freed(self, size: int) -> None:
        with self.changed:
            self.now -= size
            self.changed.notify_all()

    def left(self, timeout_s: float) -> int:
        """Bytes that stay alive. Gloo's own thread drops its hold on a tensor a moment after `wait()` has returned."""
        with self.changed:
            self.changed.wait_for(lambda: self.now == 0, timeout_s)
            return self.now


def main(out: Path, model: Path, layout: Path) -> None:
    config = config_for(Layout(**json.loads(layout.read_text())), model)
    parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    trainer = MegatronTrainer(config)
    parameters = [p for names in trainer.weight_map.parameters for p in names.values()]
    with LiveBytes([p.detach() for p in parameters]) as live:
        kept = torch.ones(1000)  # the count itself: 4,000 bytes that stay, 4,000 that go
        del kept
        assert (live.now, live.peak) == (0, 4000), (live.now, live.peak)
        live.peak = 0
        collections.deque(trainer.weights(), maxlen=0)
    left = live.left(timeout_s=30)
    assert left == 0, f"weights() left {left} bytes behind"
    peaks: list[Any] = [None] * parallel.world_size()
    dist.all_gather_object(peaks, live.peak)
    held = torch.tensor([sum(p.nbytes for p in parameters)])
    dist.all_reduce(held)
    if parallel.is_rank0():
        out.write_text(json.dumps({"peaks": peaks, "parameters": int(held)}))
    parallel.destroy()


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:4]))
