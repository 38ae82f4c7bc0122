"""Trainer side of weight verification: hashes what every server rank is to hold and compares it with what it does hold.

The slices are the server's own (plugin/held_weights.py): it says which elements of each HF tensor it keeps, this side
hashes those elements of the tensor that it sends, and at the end the two lists must agree. A tensor that no rank keeps is
allowed only where it repeats the embedding (a tied output head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torl_mega.errors import WeightSyncError
from torl_mega.serving.plugin.checksum import checksum
from torl_mega.serving.plugin.held_weights import CHECKSUMS, SLICES, spec_line
from torl_mega.serving.sync.buckets import Bucket, dtype_name
from torl_mega.serving.sync.control import Call, Deadline

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class HeldSlices:
    """The slices of a bucket's tensors that any rank of any server keeps."""

    device: str  # kind of device that the servers hold and hash them on: cpu or cuda
    keys: tuple[str, ...]  # as `parse_key` reads them


class Expectation:
    """The checksums that the servers must answer with: filled bucket by bucket during one sync, then compared."""

    def __init__(self, slices: SlicesCache) -> None:
        self.spec: list[str] = []
        self._slices = slices
        self._expected: dict[str, str] = {}  # by key
        self._whole: dict[str, str] = {}  # of the embedding and of tensors that no rank keeps, by name

    def held(self, bucket: Bucket, urls: Sequence[str], deadline: Deadline) -> HeldSlices:
        """What the servers keep of these tensors."""
        return self._slices.get(_spec(bucket), urls, deadline)

    def add(self, bucket: Bucket, held: HeldSlices) -> None:
        """Hashes the slices of this bucket. Its tensors may be reused once this has returned and they were sent."""
        self.spec += _spec(bucket)
        tensors = dict(bucket.named)
        kept = set()
        for key in held.keys:
            name, offset, size, stride, dtype = parse_key(key)
            part = tensors[name].as_strided(size, stride, tensors[name].storage_offset() + offset)
            self._expected[key] = checksum(part.to(getattr(torch, dtype)), held.device)
            kept.add(name)
        for name, tensor in bucket.named:
            if name not in kept or name.endswith(EMBEDDING):
                self._whole[name] = checksum(tensor, held.device)

    def compare(self, urls: Sequence[str], deadline: Deadline) -> None:
        """Raises WeightSyncError naming server, rank and tensor at the first difference."""
        body = {"action": CHECKSUMS, "skip_tensor_list": self.spec, "selector": "target"}
        for call in [Call(url, "/weights_checker", body, deadline) for url in urls]:
            ignored: list[set[str]] = []
            for number, held in enumerate(ranks(call)):
                self._compare_rank(f"{call.url} rank {number}", held)
                ignored.append({name for name, mark in map(_split, held) if mark == "ignored"})
            for name in set.intersection(*ignored):
                if self._whole.get(name) not in [c for n, c in self._whole.items() if n.endswith(EMBEDDING)]:
                    raise WeightSyncError(f"{call.url} has no use for tensor {name}; its model is another one")

    def _compare_rank(self, who: str, held: dict[str, str]) -> None:
        for key, there in held.items():
            name, mark = _split(key)
            if mark == "uncovered":
                raise WeightSyncError(f"{who}: no tensor was sent that fills its parameter {name}")
            if mark in ("device", "ignored"):
                continue
            here = self._expected.get(key)
            if here is None:
                raise WeightSyncError(f"{who}: keeps {key}, which it did not name when it was asked; restart it")
            if here != there:
                raise WeightSyncError(
                    f"{who}: tensor {name} (elements {mark}) has checksum {there}, {here} was sent; the weights of this "
                    f"server are not the policy's"
                )


def _spec(bucket: Bucket) -> list[str]:
    return [spec_line(name, dtype_name(tensor), tensor.shape) for name, tensor in bucket.named]


class SlicesCache:
    """Caches, per server and set of tensors, which slices of each HF tensor its ranks hold."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], HeldSlices] = {}  # by URL and described tensors

    def get(self, spec: Sequence[str], urls: Sequence[str], deadline: Deadline) -> HeldSlices:
        """The slices that these servers hold together. Raises WeightSyncError when they are on different devices."""
        text = "\n".join(spec)
        body = {"action": SLICES, "skip_tensor_list": list(spec), "selector": "target"}
        new = [Call(url, "/weights_checker", body, deadline) for url in urls if (url, text) not in self._known]
        for call in new:
            answers = ranks(call)
            keys = {key for held in answers for key in held if _split(key)[1] not in ("device", "ignored", "uncovered")}
            self._known[call.url, text] = HeldSlices(answers[0]["@device"], tuple(sorted(keys)))
        kinds = {self._known[url, text].device for url in urls}
        if len(kinds) > 1:
            raise WeightSyncError(f"servers on different devices ({', '.join(sorted(kinds))}); use one kind for a run")
        merged = dict.fromkeys(key for url in urls for key in self._known[url, text].keys)
        return HeldSlices(kinds.pop(), tuple(merged))

    def forget(self, url: str) -> None:
        """Asks this server anew: it may come back as another one."""
        self._known = {key: value for key, value in self._known.items() if key[0] != url}


def ranks(call: Call) -> list[dict[str, str]]:
    """What each rank of one server answered. Raises WeightSyncError, also for a server without our plug-in."""
    try:
        answer = call.result()
    except WeightSyncError as exc:
        if "Unsupported action" in str(exc):
            raise WeightSyncError(
                f"{call.url} cannot verify weights: install torl-mega in the server's environment (it registers an "
                f"SGLang plug-in) and start it again"
            ) from None
        raise
    return [rank["checksums"] for rank in answer["ranks"]]


def parse_key(key: str) -> tuple[str, int, tuple[int, ...], tuple[int, ...], str]:
    """(name, offset, size, stride, dtype) of a slice's key, in elements of the HF tensor."""
    name, _, rest = key.rpartition("@")
    offset, size, stride, dtype = rest.split(":")
    numbers = [tuple(int(n) for n in part.split(",") if n) for part in (size, stride)]
    assert len(numbers[0]) == len(numbers[1]), key
    assert math.prod(numbers[0]) > 0, key
    return name, int(offset), numbers[0], numbers[1], dtype


def _split(key: str) -> tuple[str, str]:
    name, _, mark = key.rpartition("@")
    return name, mark
