"""The Prometheus metrics, declared once. What each request touches is a plain number, read when somebody scrapes."""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway import __version__

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Count:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount


class Spread:
    """One series of a histogram; `bounds` are the buckets' upper ends, inclusive."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, amount: float) -> None:
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.sum += amount


class Counter(Collector):
    """prometheus_client's takes a lock and eight calls for each step; only the loop's thread counts here."""

    def __init__(self, name: str, help: str, labels: Iterable[str], registry: CollectorRegistry) -> None:
        self._name, self._help, self._labelnames = name, help, tuple(labels)
        self._series: dict[tuple[str, ...], Count] = {}
        if not self._labelnames:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Count:
        """To be kept by whoever counts often."""
        found = self._series.get(values)
        if found is None:
            assert len(values) == len(self._labelnames)
            found = self._series[values] = Count()
        return found

    @property
    def series(self) -> Mapping[tuple[str, ...], Count]:
        """By the labels' values."""
        return self._series

    def inc(self, amount: float = 1) -> None:
        self.labels().inc(amount)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._help, labels=self._labelnames)
        for values, count in self._series.items():
            family.add_metric(values, count.value)
        yield family


class Histogram(Collector):
    """As `Counter`: a step is one search in a tuple."""

    def __init__(
        self, name: str, help: str, labels: Iterable[str], buckets: tuple[float, ...], registry: CollectorRegistry
    ) -> None:
        self._name, self._help, self._labelnames = name, help, tuple(labels)
        self._bounds = tuple(map(float, buckets))
        self._series: dict[tuple[str, ...], Spread] = {}
        if not self._labelnames:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Spread:
        """To be kept by whoever observes often."""
        found = self._series.get(values)
        if found is None:
            assert len(values) == len(self._labelnames)
            found = self._series[values] = Spread(self._bounds)
        return found

    @property
    def bounds(self) -> tuple[float, ...]:
        return self._bounds

    @property
    def series(self) -> Mapping[tuple[str, ...], Spread]:
        """By the labels' values."""
        return self._series

    def observe(self, amount: float) -> None:
        self.labels().observe(amount)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labelnames)
        ends = [*map(str, self._bounds), "+Inf"]
        for values, spread in self._series.items():
            family.add_metric(values, list(zip(ends, accumulate(spread.counts), strict=True)), spread.sum)
        yield family


class Metrics:
    """All of the gateway's own metrics; prefix `gateway_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.key_registry = CollectorRegistry()
        self.started = time.monotonic()
        self.requests = self._counter("requests", "Requests answered", "path", "method", "status", "model")
        self.active = self._gauge("requests_active", "Requests being handled")
        self.duration = self._histogram("request_duration_seconds", "From the request's head to its last byte", "path")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's head to the first token", "model"
        )
        self.per_token = self._histogram(
            "time_per_output_token_seconds", "Mean time between tokens of a stream", "model", buckets=_SHORT
        )
        self.tokens = self._counter("tokens", "Tokens, by direction (in, out, cached)", "direction", "model")
        self.key_requests = Counter("gateway_key_requests", "Requests by key", ("key",), self.key_registry)
        self.key_tokens = Counter("gateway_key_tokens", "Tokens by key", ("key", "direction"), self.key_registry)
        self.queue_depth = self._gauge("queue_depth", "Requests waiting for a place", "model")
        self.queue_wait = self._histogram("queue_wait_seconds", "Wait for a place", "model")
        self.queue_rejections = self._counter("queue_rejections", "Requests that got no place", "reason")
        self.rate_limited = self._counter("rate_limited", "Requests over a limit", "reason")
        self.auth_failures = self._counter("auth_failures", "Requests without a usable key")
        self.model_state = self._gauge("model_state", "1 for the state that a model is in", "model", "state")
        self.model_load = self._histogram("model_load_seconds", "From spawn to ready", "model")
        self.evictions = self._counter("model_evictions", "Models unloaded for room or idleness", "reason")
        self.restarts = self._counter("model_restarts", "llama-servers started again after a crash", "model")
        self.model_vram = self._gauge("model_vram_bytes", "Memory of a loaded model", "model")
        self.vram_budget = self._gauge("vram_budget_bytes", "Memory that models may use")
        self.vram_used = self._gauge("vram_used_bytes", "Memory that loaded models use, as the ledger counts it")
        self.redis_up = self._gauge("redis_up", "1 while limits are shared over Redis")
        self.limits_alone = self._counter("limits_alone", "Decisions made without Redis, at this gateway's share")
        self.nats_up = self._gauge("nats_up", "1 while jobs can be taken from NATS")
        self.nats_jobs = self._counter("nats_jobs", "Jobs from NATS, by how each delivery ended", "result")
        self.cache_requests = self._counter("cache_requests", "Look-ups in the response cache", "result")
        self.bytes_sent = self._counter("bytes_sent", "Bytes of answers from models")
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late a timer fired on the event loop", buckets=_SHORT
        )
        self.tasks = self._gauge("asyncio_tasks", "Tasks on the event loop")
        self.log_errors = self._gauge("log_write_errors", "Log entries that no file could take")
        self.records_dropped = self._gauge("records_dropped", "Rows of the audit that are lost")
        self.records_skipped = self._counter("records_skipped", "Rejected requests without a key, too many to record")
        self.records_failing = self._gauge("records_failing", "1 while the disk refuses records")
        self.uptime = self._gauge("uptime_seconds", "Since the start of the gateway")
        self.uptime.set_function(lambda: time.monotonic() - self.started)
        self._gauge("build_info", "Always 1", "version").labels(__version__).set(1)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"gateway_{name}", help, labels, self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"gateway_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"gateway_{name}", help, labels, buckets, self.registry)

    def count_request(self, path: str, method: str, status: int, model: str) -> None:
        """`path` is a route's template and `model` a configured id or empty: clients cannot make new series."""
        self.requests.labels(path, method, str(status), model).inc()

    def render(self, *, with_keys: bool) -> bytes:
        """Prometheus text; counters by key only where the endpoint itself needs a key."""
        text = generate_latest(self.registry)
        return text + generate_latest(self.key_registry) if with_keys else text

    def value(self, collector: Any, keep: Callable[[dict[str, str]], bool] = lambda _: True) -> float:
        """The sum over a collector's samples (a histogram's `_sum`), for the JSON view."""
        wanted = ("_total", "_sum") if not isinstance(collector, Gauge) else ("",)
        return float(
            sum(
                sample.value
                for family in collector.collect()
                for sample in family.samples
                if sample.name.removeprefix(family.name) in wanted and keep(sample.labels)
            )
        )

    def as_json(self) -> dict[str, Any]:
        """The flat view that dashboards of earlier systems read."""

        def by_status(success: bool) -> int:
            return int(self.value(self.requests, lambda labels: (labels["status"] < "400") is success))

        return {
            "gateway": {
                "requests_total": int(self.value(self.requests)),
                "requests_success": by_status(True),
                "requests_error": by_status(False),
                "requests_active": int(self.value(self.active)),
                "bytes_sent": int(self.value(self.bytes_sent)),
                "queue_depth": int(self.value(self.queue_depth)),
                "queue_rejections": int(self.value(self.queue_rejections)),
                "queue_wait_seconds_total": self.value(self.queue_wait),
                "rate_limited": int(self.value(self.rate_limited)),
                "auth_failures": int(self.value(self.auth_failures)),
                "tokens_in": int(self.value(self.tokens, lambda labels: labels["direction"] == "in")),
                "tokens_out": int(self.value(self.tokens, lambda labels: labels["direction"] == "out")),
                "uptime_seconds": round(time.monotonic() - self.started, 3),
            }
        }


_SAMPLE = re.compile(
    r'([A-Za-z_:][A-Za-z0-9_:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?( [-+]?(?:[0-9.]\S*|Inf|NaN)(?: -?[0-9]+)?)'
)
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def merge(texts: Mapping[str, str]) -> str:
    """llama-servers' metrics (model id → text) as one text: a `model` label added, each family in one block."""
    about: dict[str, dict[str, str]] = {}  # name → HELP and TYPE, of which a family may have one each
    samples: dict[str, list[str]] = {}
    for model, text in texts.items():
        label = f'model="{model.translate(_ESCAPES)}"'
        for line in text.split("\n"):
            if line.startswith(("# HELP ", "# TYPE ")):
                _, what, name = line.split(" ", 3)[:3]
                about.setdefault(name, {}).setdefault(what, line.rstrip("\r"))
            elif match := _SAMPLE.fullmatch(line.rstrip("\r")):
                name, labels, value = match.groups()
                inside = ",".join(filter(None, ((labels or "").strip(" ,"), label)))
                samples.setdefault(name, []).append(f"{name}{{{inside}}}{value}")
    names = dict.fromkeys([*about, *samples])
    return "".join(f"{line}\n" for name in names for line in [*about.get(name, {}).values(), *samples.get(name, ())])
