"""Every metric of a shard, at zero from the start. Knows no engine: gauges are read through callables."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from stitch import buckets

# Tokens in one pass of a shard.
BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """The families as attributes, each already bound to this shard's label."""

    def __init__(self, shard: str) -> None:
        self.registry = CollectorRegistry()
        self._shard = shard
        about = "Tokens in one pass, prefill and decode together."
        self.batch_tokens = Histogram(
            "stitch_batch_tokens", about, ["shard"], buckets=BATCH_TOKENS, registry=self.registry
        ).labels(shard)
        links = Counter("stitch_link_bytes", "Bytes of hidden states.", ["direction"], registry=self.registry)
        self.sent, self.received = links.labels("sent"), links.labels("received")
        about = "How late the shard's event loop wakes up."
        self.event_loop_delay = Histogram(
            "stitch_event_loop_delay_seconds", about, buckets=buckets.EVENT_LOOP_DELAY, registry=self.registry
        )

    def read_gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read whenever somebody asks."""
        Gauge(name, about, ["shard"], registry=self.registry).labels(self._shard).set_function(read)

    def read_counter(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A sum that is kept elsewhere, and only read here."""
        self.registry.register(_Sum(name, about, self._shard, read))


class _Sum(Collector):
    def __init__(self, name: str, about: str, shard: str, read: Callable[[], float]) -> None:
        self._name, self._about, self._shard, self._read = name, about, shard, read

    def collect(self) -> list[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._about, labels=["shard"])
        family.add_metric([self._shard], self._read())
        return [family]
