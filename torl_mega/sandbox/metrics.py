"""Counters and histograms of one pool, in Prometheus' text form on /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from torl_mega.types import ExecutionResult

_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.snippets = Counter("torl_sandbox_snippets", "Snippets answered, by status", ["status"], registry=r)
        self.retries = Counter(
            "torl_sandbox_retries", "Snippets started again after an infrastructure fault", registry=r
        )
        self.zygote_deaths = Counter("torl_sandbox_zygote_deaths", "Zygotes that ended unasked", ["kind"], registry=r)
        self.refused = Counter("torl_sandbox_refused", "HTTP requests refused because the queue was full", registry=r)
        self.wall_s = Histogram("torl_sandbox_wall_seconds", "Run time of a snippet", buckets=_BUCKETS, registry=r)
        self.queue_s = Histogram(
            "torl_sandbox_queue_seconds", "Time from arrival to a slot", buckets=_BUCKETS, registry=r
        )
        self.cpu_s = Counter("torl_sandbox_cpu_seconds", "CPU time of all snippets", registry=r)
        self.running = Gauge("torl_sandbox_running", "Snippets running now", registry=r)
        self.waiting = Gauge("torl_sandbox_waiting", "Snippets in the queue now", registry=r)

    def observe(self, result: ExecutionResult) -> None:
        self.snippets.labels(result.status.value).inc()
        self.wall_s.observe(result.wall_s)
        self.cpu_s.inc(result.cpu_s)

    def text(self, *, running: int, waiting: int) -> bytes:
        self.running.set(running)
        self.waiting.set(waiting)
        return generate_latest(self.registry)
