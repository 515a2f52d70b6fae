"""A cluster of real processes, through which tests send requests, read metrics and logs, and send signals."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from stitch.client import Answer, Client
from stitch.cluster import load_cluster
from stitch.local.cluster import GATEWAY, LocalCluster, import_models, prepared
from stitch.local.run_folder import RunFolder

START_SECONDS = 180.0
END_SECONDS = 30.0
POLL_SECONDS = 0.1


class Cluster:
    """A running cluster. Each process has the name of its shard, or the name `gateway`."""

    def __init__(self, local: LocalCluster) -> None:
        self._local = local
        self.client = Client(*local.cluster.gateway_endpoint)

    @property
    def gateway(self) -> str:
        """`host:port` of the gateway."""
        return self._local.gateway

    @property
    def names(self) -> list[str]:
        return self._local.names

    def address(self, name: str) -> str:
        """`host:port` of a process."""
        return self._local.address(name)

    def pid(self, name: str) -> int:
        return self._local.processes[name].pid

    def generate(self, prompt: str | None = None, **fields: Any) -> Answer:
        """One answer through the gateway."""
        return self.client.generate(prompt, **fields)

    def kill(self, name: str) -> None:
        """SIGKILL; returns once the process is gone."""
        self.signal(name, signal.SIGKILL)
        self.wait_for_end(name)

    def signal(self, name: str, number: signal.Signals) -> None:
        self._local.processes[name].send(number)

    def wait_for_end(self, name: str, timeout_seconds: float = END_SECONDS) -> int | None:
        """Returns the exit code of a process that is ending. Raises TimeoutError where it keeps running."""
        process = self._local.processes[name]
        if not process.wait(timeout_seconds):
            raise TimeoutError(f"{name} still runs after {timeout_seconds:g} s")
        return process.exit_code

    def running(self, name: str) -> bool:
        return self._local.processes[name].running()

    def pause(self, name: str) -> None:
        """Sends SIGSTOP: the process keeps its connections and does not reply."""
        self.signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.signal(name, signal.SIGCONT)

    def restart(self, name: str) -> None:
        """Kills the process where it still runs, and starts it again at the same address.

        Returns once it serves, and the gateway reaches it.
        """
        self.kill(name)
        self._local.start(name)
        self._local.wait_until_serving([name], _ignore, START_SECONDS)
        give_up = time.monotonic() + END_SECONDS
        while not self.all_serving():
            if time.monotonic() > give_up:
                raise TimeoutError(
                    f"the gateway does not reach every running shard {END_SECONDS:g} s after {name} serves"
                )
            time.sleep(POLL_SECONDS)

    def all_serving(self) -> bool:
        """Whether the gateway reaches every shard whose process runs."""
        shards = self.client.describe(timeout=END_SECONDS).shards
        return all(shard.serving for shard in shards if self.running(shard.name))

    def metrics(self, name: str) -> dict[str, float]:
        """All samples of a process now, as `name` or `name{label="value",…}` with its labels in alphabetical order."""
        return {_sample_name(sample.name, sample.labels): sample.value for sample in self._samples(name)}

    def metric(self, name: str, metric: str, **labels: str) -> float:
        """The sum of the samples of that metric whose labels have these values; KeyError where there is none."""
        found = [
            sample.value
            for sample in self._samples(name)
            if sample.name == metric and labels.items() <= sample.labels.items()
        ]
        if not found:
            raise KeyError(f"{name} has no {metric} with {labels}")
        return float(sum(found))

    def log(self, name: str) -> str:
        """The whole log of the process."""
        return self._local.folder.log(name).read_text(errors="replace")

    def stop(self) -> None:
        """Stops every process in order, paused ones too."""
        self.client.close()
        self._local.stop(END_SECONDS)

    def _samples(self, name: str) -> Iterator[Any]:
        url = f"http://127.0.0.1:{self._local.metrics_port(name)}/metrics"
        with urllib.request.urlopen(url, timeout=END_SECONDS) as reply:
            text = reply.read().decode()
        for family in text_string_to_metric_families(text):
            yield from family.samples


@contextmanager
def running_cluster(name_or_path: str | Path, folder: Path) -> Iterator[Cluster]:
    """Runs a cluster of real processes on free ports, with its state and its logs in `folder`.

    Where the block fails, the last lines of every log are added to the error.
    """
    described = load_cluster(str(name_or_path))
    local = prepared(described, RunFolder(folder / described.name))
    import_models(local.cluster, _ignore_model)
    local.start_all(_ignore, START_SECONDS)
    cluster = Cluster(local)
    try:
        yield cluster
    except BaseException as error:
        for name in local.names:
            error.add_note(f"--- {name}\n{local.folder.last_lines(name)}")
        raise
    finally:
        cluster.stop()


def _sample_name(name: str, labels: dict[str, str]) -> str:
    pairs = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{pairs}}}" if pairs else name


def _ignore(name: str, seconds: float) -> None:
    """Reports nothing."""


def _ignore_model(name: str, folder: str) -> None:
    """Reports nothing."""


__all__ = ["GATEWAY", "Cluster", "running_cluster"]
