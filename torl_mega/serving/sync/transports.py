"""Ways to move a bucket of weights to the servers, behind one Protocol.

    broadcast  torch.distributed group of rank 0 and every server rank (gloo on CPUs, NCCL on GPUs), small tensors together
    handles    colocated servers: handles.py
    disk       safetensors in a folder that both sides see, loaded at the end

Contract: `open` and `send` return as soon as the next bucket can be prepared; `finish` waits until all is loaded. Each
raises WeightSyncError at the deadline or before. After a failure `reset` drops everything that could block the next sync,
and `drain` goes through what is left of the stream, because other ranks wait in the collectives behind it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from torl_mega.errors import WeightSyncError
from torl_mega.process.address import own_address
from torl_mega.serving.plugin.weight_receive import IN_PLACE, trips
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.control import Call, Deadline, call_all, run_bounded
from torl_mega.serving.sync.crew import make_group, wait_for


@dataclass(frozen=True, slots=True)
class Member:
    """A server process that takes part in a sync."""

    url: str
    num_ranks: int  # its tensor-parallel size
    started: str  # its start-up time: a restarted server is another member, and has left the process group


class Transport(Protocol):
    in_session: bool  # its updates must lie between begin_weight_update and end_weight_update

    def open(self, members: Sequence[Member], deadline: Deadline) -> None:
        """Prepares a sync into these servers."""
        ...

    def send(self, bucket: Bucket, deadline: Deadline) -> None:
        """Starts moving a bucket; the one before has been sent. Its tensors must stay unchanged until the next call."""
        ...

    def finish(self, deadline: Deadline) -> None:
        """Waits until every server has loaded every bucket."""
        ...

    def reset(self) -> None:
        """Drops a sync that failed, whatever state it is in; does not block."""
        ...

    def count(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """The buckets of a sync that begins, which the transport may count; called first of all."""
        ...

    def drain(self, buckets: Iterator[Bucket], reason: str) -> None:
        """Goes through the rest of a sync that failed."""
        ...


class _Alone:
    """Of transports in which rank 0 does everything: no other rank waits for its buckets."""

    def count(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        return buckets

    def drain(self, buckets: Iterator[Bucket], reason: str) -> None:
        collections.deque(buckets, maxlen=0)


class Broadcast(_Alone):
    """A process group of rank 0 and all server ranks, kept between syncs while the servers are the same processes."""

    in_session = True

    def __init__(self, host: str | None, device: torch.device) -> None:
        """`host`: what the servers call this machine; None takes the address from which it reaches them."""
        self._host = host
        self._device = device
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._group: Any = None
        self._store: Any = None
        self._name = ""
        self._members: tuple[Member, ...] = ()
        self._works: list[Any] = []
        self._in_flight: list[torch.Tensor] = []  # the memory that the works read
        self._calls: list[Call] = []
        self._stuck: list[Any] = []  # abandoned groups; destroying one blocks until its work ends

    def open(self, members: Sequence[Member], deadline: Deadline) -> None:
        self._calls, self._works = [], []
        if self._group is not None and self._members == tuple(members):
            return
        self.reset()
        limit = timedelta(seconds=deadline.left_s)
        self._name, self._members = f"torl_weights_{uuid.uuid4().hex[:12]}", tuple(members)
        host = self._host or own_address(urlsplit(member.url).hostname or "" for member in members)
        self._store = _listening_store(host, limit)
        world_size = 1 + sum(member.num_ranks for member in members)
        calls, offset = [], 1
        for member in members:
            body = {"master_address": host, "master_port": self._store.port, "rank_offset": offset}
            body |= {"world_size": world_size, "group_name": self._name, "backend": self._backend}
            calls.append(Call(member.url, "/init_weights_update_group", body, deadline))
            offset += member.num_ranks
        what = f"joining the weight group of {len(members)} servers"
        ranks, name, backend = range(world_size), self._name, self._backend
        self._group = run_bounded(
            lambda: make_group(name, backend, self._store, 0, ranks, limit), what, deadline, calls
        )
        for call in calls:
            call.result()
        self._connect(what, deadline)

    def _connect(self, what: str, deadline: Deadline) -> None:
        """Broadcasts a bucket of nothing, one byte: NCCL connects in its first collective, and waits there for ever for a
        server that does not come."""
        body = {"names": [], "dtypes": [], "shapes": [], "group_name": self._name, "flush_cache": False}
        body |= {"load_format": IN_PLACE, "torch_empty_cache": False}
        calls = [Call(m.url, "/update_weights_from_distributed", body, deadline) for m in self._members]
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        run_bounded(lambda: dist.broadcast(byte, src=0, group=self._group), what, deadline, calls)
        for call in calls:
            call.result()

    def send(self, bucket: Bucket, deadline: Deadline) -> None:
        body = {"names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes, "group_name": self._name}
        body |= {"flush_cache": False, "load_format": IN_PLACE, "torch_empty_cache": False}
        # a server takes up this call after it has loaded the bucket before, so the call may go out early
        self._calls += [Call(m.url, "/update_weights_from_distributed", body, deadline) for m in self._members]
        self._wait_until_sent(deadline)
        flat = [tensor.to(self._device).view(-1).view(torch.uint8) for _, tensor in bucket.named]
        together = trips([tensor.numel() for tensor in flat])
        self._in_flight = [torch.cat([flat[n] for n in trip]) if len(trip) > 1 else flat[trip[0]] for trip in together]
        self._works = [dist.broadcast(flat, src=0, group=self._group, async_op=True) for flat in self._in_flight]

    def _wait_until_sent(self, deadline: Deadline) -> None:
        wait_for(self._works, "broadcasting weights", deadline, self._calls)
        self._works, self._in_flight = [], []

    def finish(self, deadline: Deadline) -> None:
        self._wait_until_sent(deadline)
        for call in self._calls:
            call.result()
        self._calls = []

    def reset(self) -> None:
        if self._group is None:
            self._store = None
            return
        group, self._group = self._group, None
        deadline = Deadline(5.0)
        for member in self._members:  # frees servers that wait inside a broadcast that will not come
            Call(member.url, "/destroy_weights_update_group", {"group_name": self._name}, deadline)
        self._stuck.append((group, self._store, self._works, self._in_flight))
        self._store, self._works, self._in_flight, self._calls, self._members = None, [], [], [], ()
        threading.Thread(target=_abort, args=(group,), daemon=True, name="abort weight group").start()
        self._stuck = [kept for kept in self._stuck if not all(work.is_completed() for work in kept[2])]


def _listening_store(host: str, limit: timedelta) -> TCPStore:
    """The group's rendezvous, listening on `host` alone; TCPStore by itself listens on every interface."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=listener.detach()
    )


def _abort(group: Any) -> None:
    """Ends an abandoned group; either call may fail, or block for long, on peers that are gone."""
    with contextlib.suppress(RuntimeError, AttributeError, ValueError, KeyError, AssertionError):
        group.abort()
    with contextlib.suppress(RuntimeError, AttributeError, ValueError, KeyError, AssertionError):
        dist.destroy_process_group(group)


class Disk(_Alone):
    """Writes one safetensors file per bucket and an index into a folder of its own, which is removed afterwards."""

    in_session = False

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._folder: Path | None = None
        self._urls: tuple[str, ...] = ()
        self._index: dict[str, str] = {}

    def open(self, members: Sequence[Member], deadline: Deadline) -> None:
        self.reset()
        self._urls, self._index = tuple(member.url for member in members), {}
        self._folder = self._root / f"weights_{uuid.uuid4().hex[:12]}"
        try:
            self._folder.mkdir(parents=True)
        except OSError as exc:
            raise WeightSyncError(f"serving.disk_dir = {self._root}: {exc.strerror}; name a writable folder") from None

    def send(self, bucket: Bucket, deadline: Deadline) -> None:
        from safetensors.torch import save_file

        assert self._folder is not None
        name = f"model-{len(set(self._index.values())):05d}.safetensors"
        save_file({name: tensor.cpu() for name, tensor in bucket.named}, self._folder / name, {"format": "pt"})
        self._index |= dict.fromkeys(bucket.names, name)
        deadline.check(f"writing {self._folder / name}")

    def finish(self, deadline: Deadline) -> None:
        assert self._folder is not None
        index = {"metadata": {}, "weight_map": self._index}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index))
        body = {"model_path": str(self._folder.resolve()), "load_format": "safetensors", "flush_cache": False}
        call_all(self._urls, "/update_weights_from_disk", body, deadline)
        self.reset()

    def reset(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
