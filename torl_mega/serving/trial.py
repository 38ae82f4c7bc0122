"""The way of the weights in small: a bucket by handle and one communicator, from the trainer's Python to SGLang's.

    python -m torl_mega.serving.trial trainer PORT DEVICE NUM_RANKS     under the trainer's Python
    python -m torl_mega.serving.trial server PORT DEVICE NUM_RANKS      under SGLang's, at the same time

Both talk through a TCPStore on PORT. DEVICE is `cpu`, where handles hold the bytes and the group is gloo's, or `cuda`: the
bucket lies on the trainer's first visible GPU and is opened wherever SGLang finds that GPU, by UUID. NUM_RANKS is 2 where the
first visible GPU of the server is another one, else 1: NCCL refuses two ranks on one GPU, so each makes a group of its own.
Each line printed is a JSON object {"name", "ok", "detail"}. Used by `torl doctor --gpu` (launch/gpu_trial.py).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.cuda import nccl

LIMIT = timedelta(seconds=90)  # in which the other side imports SGLang
MIB = {"cuda": 64, "cpu": 1}  # a handle is small; by value the store takes a few MiB


def pattern(device: torch.device) -> tuple[tuple[str, torch.Tensor], ...]:
    """Tensors of two types whose every element both sides know."""
    count = torch.arange(MIB[device.type] << 19, device=device, dtype=torch.int32)
    return ("words", count[: len(count) // 4]), ("bytes", (count % 251).to(torch.uint8))


def trainer(store: Store, device: torch.device) -> str:
    """Hands a bucket over; the text says how. Raises RuntimeError with the server's words when it was not read."""
    from torl_mega.serving.sync.buckets import Bucket
    from torl_mega.serving.sync.handles import payload

    bucket = Bucket(pattern(device))
    flat = bucket.flatten_into(torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device))
    if flat.is_cuda:
        torch.cuda.synchronize()
    begun = time.monotonic()
    store.set("payload", payload(bucket, flat).decode())
    if problem := store.get("opened").decode():  # until then the memory behind the handle must stay
        raise RuntimeError(problem)
    how = "CUDA IPC handle" if flat.is_cuda else "value (no GPU)"
    return f"{bucket.num_bytes >> 20} MiB by {how} in {time.monotonic() - begun:.2f} s, every element checked"


def server(store: Store, device: torch.device) -> str:
    """Reads the trainer's bucket with SGLang's own code and compares it; tells the trainer what is wrong with it."""
    text = store.get("payload").decode()
    problem = "SGLang's side ended"
    try:
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        monkey_patch_torch_reductions()
        read = MultiprocessingSerializer.deserialize(text)
        bucket = FlattenedTensorBucket(flattened_tensor=read["flattened_tensor"], metadata=read["metadata"])
        wrong = [
            name
            for (name, found), (_, wanted) in zip(
                bucket.reconstruct_tensors(), pattern(read["flattened_tensor"].device), strict=True
            )
            if not torch.equal(found, wanted)
        ]
        problem = f"other bytes than were sent in {', '.join(wrong)}" if wrong else ""
    except Exception as exc:
        problem = f"{type(exc).__name__}: {exc}"
        raise
    finally:
        store.set("opened", problem)
    if problem:
        raise RuntimeError(problem)
    return f"read on {read['flattened_tensor'].device}"


def group(store: Store, device: torch.device, rank: int, num_ranks: int) -> str:
    """One broadcast from the trainer to the server, or of each to itself."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    name = "group" if num_ranks > 1 else f"group_{rank}"
    rank = rank if num_ranks > 1 else 0
    begun = time.monotonic()
    dist.init_process_group(backend, store=PrefixStore(name, store), rank=rank, world_size=num_ranks, timeout=LIMIT)
    wanted = dict(pattern(device))["bytes"]
    found = wanted.clone() if rank == 0 else torch.zeros_like(wanted)
    dist.broadcast(found, src=0)
    well = torch.equal(found, wanted)
    dist.destroy_process_group()
    if not well:
        raise RuntimeError("other bytes came than were sent")
    version = ".".join(map(str, nccl.version())) if backend == "nccl" else "no GPU"
    return f"{num_ranks} rank{'s' * (num_ranks > 1)} of {backend} ({version}) in {time.monotonic() - begun:.2f} s"


def attempt(name: str, what: Callable[[], str]) -> bool:
    """Runs `what` and prints how it went."""
    try:
        detail, well = what(), True
    except Exception as exc:  # the boundary of this program: what fails is what it is to find
        detail, well = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}", False
    print(json.dumps({"name": name, "ok": well, "detail": detail}), flush=True)
    return well


def main(side: str, port: str, device_type: str, num_ranks: str) -> int:
    rank = ("trainer", "server").index(side)
    store = TCPStore("127.0.0.1", int(port), 2, is_master=rank == 0, timeout=LIMIT)
    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    handed = attempt("handle", lambda: (trainer, server)[rank](store, device))
    grouped = attempt("group", lambda: group(store, device, rank, int(num_ranks)))
    store.set(f"done_{rank}", "")
    if rank == 0:
        store.get("done_1")  # the store ends with this process
    return int(not (handed and grouped))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
