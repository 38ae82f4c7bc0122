"""One trainer rank that syncs its weights into running servers: colocated_worker.py CONF SCENARIO OUT [a.b=value …]

Torchrun's names, TORL_SERVERS and TORL_OWNERS in the environment. SCENARIO is a list in JSON of what happens to each sync:
"" for nothing, "flip" (rank 1 hands over a wrong bit), "kill:PID" (rank 0 kills a process half-way), "die" (rank 1 does).
Rank 0 writes OUT: for each sync its report, or {"error": type, "text": message, "after_s": seconds}.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torl_mega.config_file import load_config
from torl_mega.errors import WeightSyncError
from torl_mega.interfaces import NamedTensor
from torl_mega.serving.sync.weights import make_owner_sink, make_weight_sink, route_weights
from torl_mega.trainer import parallel

BUCKET_BYTES = 50_000  # many buckets from a small model


class BadWire:
    """A crew whose broadcast arrives with one wrong bit in the first tensor of the first bucket."""

    def __init__(self, crew: Any) -> None:
        self._crew, self._done = crew, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._crew, name)

    def broadcast(self, flat: torch.Tensor, deadline: Any) -> None:
        self._crew.broadcast(flat, deadline)
        flat[0] ^= 0 if self._done else 1
        self._done = True


def stream(weights: Iterator[NamedTensor], num_tensors: int, what: str) -> Iterator[NamedTensor]:
    """The weights, in the middle of which `what` happens."""
    for number, item in enumerate(weights):
        if number == num_tensors // 2:
            if what == "die" and parallel.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if what.startswith("kill:") and parallel.is_rank0():
                os.kill(int(what.removeprefix("kill:")), signal.SIGKILL)
        yield item
        del item


class Idle:
    def update(self, tensors: Iterator[NamedTensor], *, version: int) -> dict[str, float]:
        collections.deque(tensors, maxlen=0)
        return {}


def main(conf: str, scenario: str, out: Path, *overrides: str) -> None:
    config = load_config(conf, overrides)
    parallel.init_distributed(config.parallel, config.trainer)
    from torl_mega.trainer.megatron_trainer import MegatronTrainer

    trainer = MegatronTrainer(config)
    serving, owners = route_weights(config.serving)
    sink: Any = make_owner_sink(serving, parallel.rank(), owners=owners) or Idle()
    if parallel.is_rank0():
        sink = make_weight_sink(serving, os.environ["TORL_SERVERS"].split(","), owners=owners)
    sink.bucket_bytes = BUCKET_BYTES
    num_tensors = sum(1 for _ in trainer.weights())
    found = []
    for version, what in enumerate(json.loads(scenario), 1):
        if what == "flip" and parallel.rank() == 1:
            sink._handles._crew = BadWire(sink._handles._crew)
        begun = time.monotonic()
        try:
            found.append(dict(sink.update(stream(trainer.weights(), num_tensors, what), version=version)))
        except WeightSyncError as exc:
            found.append({"error": type(exc).__name__, "text": str(exc), "after_s": time.monotonic() - begun})
        if parallel.is_rank0():
            out.write_text(json.dumps(found))
        if what == "die":
            os._exit(0)  # the group is broken
        parallel.share(lambda: None)
    parallel.destroy()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
