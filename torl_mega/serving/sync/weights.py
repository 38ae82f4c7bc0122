"""Sends the policy's weights to every server and verifies what each one holds.

    trainer.weights() ─► buckets ─┬─► transport ─► servers load ─► hash what each rank holds now ─┐
                                  └─► hash what each server rank is to hold ───────────────────────┴─► compare
                                                                                                          │
                                        version recorded, servers take requests again ◄─ all equal ◄──────┘

Contract: a server carries policy version V only after every byte of V on it was compared: the version is set last. A sync
succeeds on every server that was up when it began, or raises WeightSyncError within serving.sync_timeout_s. Servers that
are down when it begins are left out, counted, and get all weights at the next sync after they are back. When one dies in
the middle the error is `ServerLost`: calling `update` again with fresh tensors goes on without it.
Not covered: speculative (draft) models, pipeline-parallel servers with tied embeddings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from torl_mega.config import ServingConfig
from torl_mega.errors import ServerLost, WeightSyncError
from torl_mega.interfaces import NamedTensor, WeightSink
from torl_mega.serving.fp8 import Fp8Sink
from torl_mega.serving.sync.buckets import Bucket, make_buckets
from torl_mega.serving.sync.control import Call, Deadline, call_all
from torl_mega.serving.sync.handles import Handles, Owners
from torl_mega.serving.sync.transports import Broadcast, Disk, Member, Transport
from torl_mega.serving.sync.verify import Expectation, SlicesCache

PROBE_LIMIT_S = 4.0
NONE_UP_POLL_S = 0.5
CLEANUP_LIMIT_S = 3.0
TORN = "torn"


def route_weights(config: ServingConfig) -> tuple[ServingConfig, Owners]:
    """The config with the transport that fits this run's placement (`broadcast` where none is known), and which ranks stand
    beside which server: what launch/commands.py put into the environment, the same on every rank."""
    transport = os.environ.get("TORL_TRANSPORT", "broadcast" if config.transport == "auto" else config.transport)
    beside = [text for text in os.environ.get("TORL_OWNERS", "").split(";") if text]
    urls = os.environ["TORL_SERVERS"].split(",") if beside else []
    owners = {url: tuple(map(int, ranks.split(","))) for url, ranks in zip(urls, beside, strict=True)}
    return config.model_copy(update={"transport": transport}), owners


def make_weight_sink(
    config: ServingConfig, urls: Sequence[str], *,
    device: torch.device | str = "cpu", flush_cache: bool = True, owners: Owners | None = None,
) -> WeightSink:  # fmt: skip
    """Rank 0's sink. `device` is where rank 0 keeps the tensors: `cpu` (gloo, by value) or `cuda:N` (NCCL, CUDA IPC);
    `flush_cache` as in `ServerSink`; `owners` for `handles`. Raises WeightSyncError without servers."""
    if not urls:
        raise WeightSyncError("no server to send weights to; set serving.urls or serving.num_servers")
    transport = make_transport(config, torch.device(device), owners or {})
    sink = ServerSink(config, urls, transport, flush_cache=flush_cache)
    return Fp8Sink(sink) if config.weight_dtype == "fp8_block" else sink


def make_owner_sink(
    config: ServingConfig, rank: int, *, device: torch.device | str = "cpu", owners: Owners
) -> WeightSink | None:
    """The sink of a rank other than 0 that stands beside servers and hands them the weights; None for all others."""
    if config.transport != "handles" or not any(rank in ranks for ranks in owners.values()):
        return None
    sink = OwnerSink(config, Handles(owners, torch.device(device)))
    return Fp8Sink(sink) if config.weight_dtype == "fp8_block" else sink


def make_transport(config: ServingConfig, device: torch.device, owners: Owners) -> Transport:
    """The transport that `serving.transport` names; `auto` without a placement is `broadcast`."""
    if config.transport == "handles":
        return Handles(owners, device)
    if config.transport == "disk":
        assert config.disk_dir is not None  # the config sees to it
        return Disk(Path(config.disk_dir))
    return Broadcast(config.sync_host, device)


class OwnerSink:
    """Of a rank other than 0 that hands weights to servers beside it; its tensors have no data."""

    def __init__(self, config: ServingConfig, handles: Handles) -> None:
        self.bucket_bytes = config.bucket_mb * 2**20
        self._limit_s = config.sync_timeout_s
        self._handles = handles

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        """Hands over, and leaves checking and counting to rank 0. Raises WeightSyncError when the sync failed on any rank."""
        buckets = self._handles.count(make_buckets(tensors, self.bucket_bytes))
        try:
            self._handles.follow(buckets, self._limit_s)
        except WeightSyncError as exc:
            self._handles.drain(buckets, str(exc))
            raise
        return {}


class ServerSink:
    """Rank 0's. `flush_cache` drops the servers' cached prefixes, which the old weights computed; False when requests stay
    paused during the sync and keep their KV cache."""

    def __init__(
        self, config: ServingConfig, urls: Sequence[str], transport: Transport, *, flush_cache: bool = True
    ) -> None:
        self.flush_cache = flush_cache
        self.bucket_bytes = config.bucket_mb * 2**20
        self._config = config
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._transport = transport
        self._slices = SlicesCache()

    def update(self, tensors: Iterable[NamedTensor], *, version: int) -> Mapping[str, float]:
        """Sends, verifies, records `version`. Returns seconds, bytes and counts. Raises WeightSyncError."""
        begun, deadline = time.monotonic(), Deadline(self._config.sync_timeout_s)
        buckets = self._transport.count(make_buckets(tensors, self.bucket_bytes))
        up: list[Member] = []
        try:
            up = self._members(deadline)
            expected = Expectation(self._slices)
            urls = [member.url for member in up]
            num_bytes, num_tensors = self._transfer(buckets, expected, up, deadline)
            verified = time.monotonic()
            expected.compare(urls, deadline)
            verify_s = time.monotonic() - verified
            self._publish(version, urls, deadline)
        except WeightSyncError as exc:
            self._clean_up(up)
            self._transport.drain(buckets, str(exc))
            lost = sorted({member.url for member in set(up) - set(self._answering([m.url for m in up]))})
            if lost and len(lost) < len(self._urls):
                raise ServerLost(f"{exc} (lost in the sync: {', '.join(lost)}; sync again to go on without)") from exc
            raise
        except BaseException:
            self._clean_up(up)
            raise
        sync_s = time.monotonic() - begun
        down = len(self._urls) - len(up)
        counts = {"bytes": num_bytes, "num_tensors": num_tensors, "num_servers": len(up), "num_servers_down": down}
        return {"sync_s": sync_s, **counts, "verify_s": verify_s}

    def _transfer(
        self, buckets: Iterator[Bucket], expected: Expectation, up: Sequence[Member], deadline: Deadline
    ) -> tuple[int, int]:
        urls = [member.url for member in up]
        if self._transport.in_session:
            self._begin(urls, deadline)
        self._transport.open(up, deadline)
        num_bytes = num_tensors = 0
        for bucket in buckets:
            held = expected.held(bucket, urls, deadline)
            self._transport.send(bucket, deadline)
            expected.add(bucket, held)  # hashes it while it is on its way
            num_bytes += bucket.num_bytes
            num_tensors += len(bucket.named)
            del bucket  # before the next one fills up
        self._transport.finish(deadline)
        if num_tensors == 0:
            raise WeightSyncError("the trainer gave rank 0 no tensors to send")
        return num_bytes, num_tensors

    def _begin(self, urls: Sequence[str], deadline: Deadline) -> None:
        """Opens a weight-update session on every server; closes one first that a dead trainer left open."""
        for call in [Call(url, "/begin_weight_update", {"selector": "target"}, deadline) for url in urls]:
            try:
                call.result()
            except WeightSyncError as exc:
                if "already open" not in str(exc):
                    raise
                Call(call.url, "/end_weight_update", {}, deadline).result()
                Call(call.url, "/begin_weight_update", {"selector": "target"}, deadline).result()

    def _publish(self, version: int, urls: Sequence[str], deadline: Deadline) -> None:
        """After verification: closes the session, flushes the prefix cache, and only then sets the new version."""
        if self._transport.in_session:
            call_all(urls, "/end_weight_update", {}, deadline)
        if self.flush_cache:
            call_all(urls, "/flush_cache", {}, deadline)
        call_all(urls, "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}, deadline)
        for url, info in zip(urls, call_all(urls, "/model_info", None, deadline), strict=True):
            if info.get("weight_version") != str(version):
                raise WeightSyncError(f"{url} reports version {info.get('weight_version')!r} after a sync of {version}")

    def _members(self, deadline: Deadline) -> list[Member]:
        """The servers that take part: those that answer now. While none does, all may be restarting: then it waits."""
        while not (up := self._answering(self._urls)):
            deadline.check(f"no server answers: {', '.join(self._urls)}; see their logs")
            time.sleep(NONE_UP_POLL_S)
        for url in set(self._urls) - {member.url for member in up}:
            self._slices.forget(url)
        return up

    def _answering(self, urls: Sequence[str]) -> list[Member]:
        """Those of `urls` whose scheduler answers within a few seconds."""
        deadline = Deadline(PROBE_LIMIT_S)
        up = []
        for call in [Call(url, "/server_info", None, deadline) for url in urls]:
            try:
                info = call.result()
                up.append(Member(call.url, int(info["tp_size"]), str(info["startup_time"])))
            except WeightSyncError:
                continue
        return up

    def _clean_up(self, up: Sequence[Member]) -> None:
        """After a failure: marks the servers that still answer as `torn`, a version that no client accepts because the
        weights may be a mixture, and closes their session."""
        self._transport.reset()
        deadline, torn = Deadline(CLEANUP_LIMIT_S), {"new_version": TORN, "abort_all_requests": False}
        calls = [Call(member.url, "/update_weight_version", torn, deadline) for member in up]
        if self._transport.in_session:
            calls += [Call(member.url, "/end_weight_update", {}, deadline) for member in up]
        for call in calls:
            try:
                call.result()
            except WeightSyncError:
                continue
