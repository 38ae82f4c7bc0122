"""Weights to servers beside the trainer: each bucket goes to the ranks that share a server's GPUs, and they hand it over.

    rank 0: bucket ─┬─ broadcast ─► rank 2 (GPU 2) ─► payload ──────────────┐
                    └─────────────► rank 3 (GPU 3) ─► payload ─► rank 2 ────┴─► one request to the server on GPUs 2, 3

Each rank of a server gets a payload of its own, from the trainer's rank on its own GPU. The source says why: SGLang's rank
t opens payload t alone (srt/managers/tp_worker.py deserialize_own_rank) and finds its device among those it sees by UUID
(srt/utils/patch_torch.py). A handle of a neighbour's GPU would open too, but costs a CUDA context there.
On a CPU a rank shares the memory itself with a server of one rank beside it, which is told where: /proc/PID/fd/N, which needs no
name in any file system and is gone with the rank. Other servers get payloads with the bytes in them.
Contract: as `Transport`; ranks other than 0 call `follow`. No rank holds more than two buckets: the one that is handed over
and, on rank 0, the one that fills up meanwhile.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import os
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import orjson
import torch
from torch.multiprocessing.reductions import reduce_tensor

from torl_mega.errors import WeightSyncError
from torl_mega.serving.plugin.weight_receive import SHARED
from torl_mega.serving.sync.buckets import Bucket
from torl_mega.serving.sync.control import Call, Deadline
from torl_mega.serving.sync.crew import Crew
from torl_mega.serving.sync.transports import Member

Owners = Mapping[str, tuple[int, ...]]
"""By URL of a server: the trainer's rank beside each of its ranks. A server that is not named gets all from rank 0."""

_ROLLOUT_S = 86400.0  # rank 0 may first have to wait for trajectories; that it hangs is for the launcher to find
_DEVICE = 6  # among the arguments of torch's rebuild_cuda_tensor


class Handles:
    """By CUDA IPC handle on GPUs, in shared memory on a CPU; by value to CPU servers of several ranks, or elsewhere."""

    in_session = True

    def __init__(self, owners: Owners, device: torch.device) -> None:
        self._owners = dict(owners)
        self._device = device
        # a server of several ranks answers when its first is done: the memory of a bucket would be written again too early
        self._shares = device.type == "cpu" and bool(owners) and all(len(ranks) == 1 for ranks in owners.values())
        self._crew = Crew({rank for ranks in owners.values() for rank in ranks}, device)
        self._members: tuple[Member, ...] = ()
        self._calls: list[Call] = []
        self._in_flight: torch.Tensor | None = None  # a handle is valid only as long as its memory
        self._room: SharedMemory | None = None  # on a CPU, for the buckets of one sync
        self._failure = ""  # of this rank, told at the next boundary
        self._reached = 0  # boundaries that this rank's stream has come to
        self._agreed = 0  # those that all ranks have passed together; -1 when there are no more

    def open(self, members: Sequence[Member], deadline: Deadline) -> None:
        self._members = self._agree(deadline, tuple(members))

    def count(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """The same buckets; the start, each bucket and the end are boundaries, at which the other ranks wait for this one."""
        self._failure, self._reached, self._agreed = "", 1, 0
        return self._counted(buckets)

    def _counted(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        for bucket in buckets:
            self._reached += 1
            yield bucket
            del bucket
        self._reached += 1

    def send(self, bucket: Bucket, deadline: Deadline) -> None:
        self._agree(deadline)
        flat = self._memory(bucket.num_bytes)
        if self._crew.rank == 0:
            bucket.flatten_into(flat)
        self._crew.broadcast(flat, deadline)
        self._in_flight = flat
        make = functools.partial(payload, bucket, flat)  # a handle may be opened once
        make = make if flat.is_cuda else functools.cache(make)
        for member in self._members:
            try:
                self._hand_over(member, bucket, make, deadline)
            except WeightSyncError as exc:  # raised on every rank at the next boundary
                self._failure = self._failure or str(exc)

    def _memory(self, num_bytes: int) -> torch.Tensor:
        if not self._shares:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if self._room is None or self._room.bytes.numel() < num_bytes:
            self._room = SharedMemory(num_bytes)
        return self._room.bytes[:num_bytes]

    def _hand_over(self, member: Member, bucket: Bucket, make: Callable[[], bytes], deadline: Deadline) -> None:
        owners, me = self._owners.get(member.url, (0,) * member.num_ranks), self._crew.rank
        room = self._room if member.url in self._owners else None
        if room is not None:
            make = room.path.encode
        if len(owners) != member.num_ranks:
            raise WeightSyncError(
                f"{member.url} has {member.num_ranks} ranks, the placement says {len(owners)}; plan again"
            )
        payloads = []
        for owner in owners:
            if owner == me:
                payloads.append(make())
                if owners[0] != me:
                    self._crew.pass_on(payloads[-1], owners[0], deadline)
            elif owners[0] == me:
                payloads.append(self._crew.take(owner, deadline))
        if owners[0] == me:
            path, body = _in_place(bucket, payloads) if room is not None else _by_payload(payloads)
            body |= {"flush_cache": False, "torch_empty_cache": False}
            self._calls.append(Call(member.url, path, body, deadline))

    def finish(self, deadline: Deadline) -> None:
        self._agree(deadline)
        self._agreed, self._room = -1, None

    def _agree(self, deadline: Deadline, note: Any = None) -> Any:
        """The next boundary: the bucket before has been loaded by every server, or every rank raises why not."""
        try:
            for call in self._calls:
                call.result()
        except WeightSyncError as exc:
            self._failure = self._failure or str(exc)
        self.reset()
        self._agreed += 1
        try:
            return self._crew.agree(self._failure, deadline, note)
        except WeightSyncError:
            self._agreed, self._room = -1, None
            raise

    def follow(self, buckets: Iterator[Bucket], limit_s: float) -> None:
        """A whole sync on a rank other than 0, whose buckets, counted, say only what the tensors look like. `limit_s` counts
        from when rank 0 begins."""
        self.open((), Deadline(_ROLLOUT_S))
        deadline = Deadline(limit_s)
        for bucket in buckets:
            self.send(bucket, deadline)
        self.finish(deadline)

    def drain(self, buckets: Iterator[Bucket], reason: str) -> None:
        """This rank gives up: the others learn why at the next boundary, and then all only go through their gathers."""
        self._failure = self._failure or reason
        self._tell()
        while not self._crew.broken and next(buckets, None) is not None:
            self._tell()
        self._tell()

    def _tell(self) -> None:
        if self._reached > self._agreed >= 0 and not self._crew.broken:
            with contextlib.suppress(WeightSyncError):  # the failure itself
                self._agree(Deadline(0.0))

    def reset(self) -> None:
        self._calls, self._in_flight = [], None
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # memory that servers have let go of since


class SharedMemory:
    """Memory that another process of this user maps by the name of our descriptor of it, and that nothing has to clean up."""

    def __init__(self, num_bytes: int) -> None:
        self._file = os.memfd_create("torl_weights")
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, num_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.bytes = torch.from_file(self.path, shared=True, size=num_bytes, dtype=torch.uint8)


def _in_place(bucket: Bucket, paths: Sequence[bytes]) -> tuple[str, dict[str, Any]]:
    """A request that says where the bucket lies for each rank of a server."""
    body: dict[str, Any] = {"names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes}
    return "/update_weights_from_distributed", body | {
        "group_name": b",".join(paths).decode(),
        "load_format": SHARED,
    }


def _by_payload(payloads: Sequence[bytes]) -> tuple[str, dict[str, Any]]:
    texts = [orjson.Fragment(b'"' + part + b'"') for part in payloads]
    return "/update_weights_from_tensor", {"serialized_named_tensors": texts, "load_format": "flattened_bucket"}


def payload(bucket: Bucket, flat: torch.Tensor) -> bytes:
    """What SGLang's `MultiprocessingSerializer.deserialize` reads, in base64: the bucket as `flat`, and where in it each tensor
    lies. A handle may be opened once: each rank of a server needs a payload of its own."""
    metadata, start = [], 0
    for name, tensor in bucket.named:
        end = start + tensor.nbytes
        place = {"start_idx": start, "end_idx": end, "numel": tensor.nbytes}
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, **place))
        start = end
    _load_by_torchs_name()
    buffer = io.BytesIO()
    _Pickler(buffer).dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(buffer.getbuffer())


def _load_by_torchs_name() -> None:
    """megatron-core 0.19.2 puts a function of its own in the place of `torch.storage._load_from_bytes` (megatron/core/__init__.py).
    A storage that is pickled by value names it, and SGLang refuses all names but torch's: it gets the name of its place."""
    stands_there = torch.storage._load_from_bytes
    stands_there.__module__, stands_there.__qualname__ = "torch.storage", "_load_from_bytes"


class _Pickler(pickle.Pickler):
    """CUDA tensors as IPC handles with the device's UUID, which SGLang's patch of torch's rebuild_cuda_tensor takes in place
    of a number; everything else as usual. Only names that SGLang's SafeUnpickler allows (srt/utils/common.py)."""

    def reducer_override(self, obj: Any) -> Any:
        if not (isinstance(obj, torch.Tensor) and obj.is_cuda):
            return NotImplemented
        rebuild, arguments = reduce_tensor(obj)
        return rebuild, by_uuid(arguments, str(torch.cuda.get_device_properties(obj.device).uuid))


def by_uuid(arguments: tuple[Any, ...], uuid: str) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor` with the device named by UUID: servers number their GPUs differently."""
    return (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
