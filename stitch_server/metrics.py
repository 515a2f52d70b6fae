"""What a shard records of its work: Prometheus metrics, and the step log.

`Metrics` holds every metric of a shard, each at zero from the start, and reads gauges through callables. `StepLog`
appends a line for every pass, so that the passes of neighbouring shards can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from stitch import buckets
from stitch_server.engine.types import Batch

BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """The metrics as attributes, each bound to this shard's label."""

    def __init__(self, shard: str) -> None:
        self.registry = CollectorRegistry()
        self._shard = shard
        about = "Tokens in one forward pass, prefill and decode together."
        self.batch_tokens = Histogram(
            "stitch_batch_tokens", about, ["shard"], buckets=BATCH_TOKENS, registry=self.registry
        ).labels(shard)
        about = "Bytes of hidden states on the links to neighbouring shards."
        links = Counter("stitch_link_bytes", about, ["direction"], registry=self.registry)
        self.link_bytes_sent, self.link_bytes_received = links.labels("sent"), links.labels("received")
        about = "Replies, tokens and failures of next shards that answer no step of that link."
        strays = Counter("stitch_link_stray_replies", about, ["shard"], registry=self.registry)
        self.link_stray_replies = strays.labels(shard)
        about = "The delay with which the event loop wakes up after a sleep."
        self.event_loop_delay = Histogram(
            "stitch_event_loop_delay_seconds", about, buckets=buckets.EVENT_LOOP_DELAY, registry=self.registry
        )
        about = "Tasks of the event loop."
        self.event_loop_tasks = Gauge("stitch_event_loop_tasks", about, registry=self.registry)

    def read_gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Adds a gauge whose value is read at every scrape."""
        Gauge(name, about, ["shard"], registry=self.registry).labels(self._shard).set_function(read)

    def read_counter(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Adds a counter whose value is kept elsewhere and read at every scrape."""
        self.registry.register(_ReadCounter(name, about, self._shard, read))


class _ReadCounter(Collector):
    def __init__(self, name: str, about: str, shard: str, read: Callable[[], float]) -> None:
        self._name, self._about, self._shard, self._read = name, about, shard, read

    def collect(self) -> list[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._about, labels=["shard"])
        family.add_metric([self._shard], self._read())
        return [family]


# Called after each pass with its batch, and the values of `time.perf_counter` at its start and its end.
PassObserver = Callable[[Batch, float, float], None]


class StepLog:
    """Appends JSON lines to `FOLDER/SHARD.jsonl`. Its clock is the machine's, so files of neighbours are comparable."""

    def __init__(self, folder: Path, shard: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{shard}.jsonl").open("a")

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def __call__(self, batch: Batch, started: float, ended: float) -> None:
        """Writes one line: start and end in seconds, the number of tokens, and the number of sessions."""
        line = {"started": started, "ended": ended, "tokens": batch.num_tokens, "sessions": len(batch.segments)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
