"""One rank of a colocated sync without models: crew_worker.py OWNERS OUT, torchrun's names in the environment.

OWNERS: JSON, URL -> ranks beside each of the server's ranks. OUT: for each sync what this rank raised, "" for nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torl_mega.errors import WeightSyncError
from torl_mega.serving.sync.buckets import Bucket, make_buckets
from torl_mega.serving.sync.control import Deadline
from torl_mega.serving.sync.handles import Handles
from torl_mega.serving.sync.transports import Member

SYNCS = (
    "wrong byte on rank 2",
    "a server refuses",
    "a server of another size",
    "rank 0 gives up early",
    "rank 0 gives up late",
    "good",
    "rank 2 dies",
)
TENSORS = tuple((f"t{n}", torch.arange(n, n + 1000, dtype=torch.float32)) for n in range(6))
BUCKET_BYTES = 8000
LIMIT_S = 20.0


class WrongByte:
    """A crew whose broadcasts arrive with a wrong first byte."""

    def __init__(self, crew: Any) -> None:
        self._crew = crew

    def __getattr__(self, name: str) -> Any:
        return getattr(self._crew, name)

    def broadcast(self, flat: torch.Tensor, deadline: Deadline) -> None:
        self._crew.broadcast(flat, deadline)
        flat[0] ^= 1


def buckets(rank: int, what: str) -> Iterator[Bucket]:
    for number, bucket in enumerate(
        make_buckets(((n, t if rank == 0 else t.to("meta")) for n, t in TENSORS), BUCKET_BYTES)
    ):
        if what == "rank 2 dies" and rank == 2 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield bucket


def send_all(handles: Handles, stream: Iterator[Bucket], members: list[Member], what: str) -> None:
    """Rank 0's part, as ServerSink plays it."""
    deadline = Deadline(LIMIT_S)
    try:
        if what == "a server of another size":
            members = [Member(m.url, m.num_ranks + (m is members[1]), m.started) for m in members]
        if what == "rank 0 gives up early":
            raise WeightSyncError("no server answers")
        handles.open(members, deadline)
        for number, bucket in enumerate(stream):
            if what == "rank 0 gives up late" and number == 1:
                raise WeightSyncError("no slices")
            handles.send(bucket, deadline)
        handles.finish(deadline)
    except WeightSyncError as exc:
        handles.reset()
        handles.drain(stream, str(exc))
        raise


def main(owners: dict[str, list[int]], out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:  # as Megatron's layouts do, which give ranks different numbers of groups
        dist.new_group([0], backend="gloo", use_local_synchronization=True)
    handles = Handles({url: tuple(ranks) for url, ranks in owners.items()}, torch.device("cpu"))
    members = [Member(url, len(ranks), "0") for url, ranks in owners.items()]
    crew = handles._crew
    said = []
    for what in SYNCS:
        handles._crew = WrongByte(crew) if (what, rank) == (SYNCS[0], 2) else crew  # type: ignore[assignment]
        stream = handles.count(buckets(rank, what))
        try:
            if rank == 0:
                send_all(handles, stream, members, what)
            else:
                handles.follow(stream, LIMIT_S)
            said.append("")
        except WeightSyncError as exc:
            said.append(str(exc))
        out.write_text(json.dumps(said))
        if what != SYNCS[-1]:
            dist.barrier()
            assert next(stream, None) is None or rank, "rank 0 left tensors behind"
    os._exit(0)  # the group is broken


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
