"""A cluster of real processes, through which tests send requests, read metrics and logs, and send signals.

Gates may stand between its processes, and it may have several gateways: `running_cluster` takes both.
"""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from stitch import channels
from stitch.client import Answer, Client
from stitch.cluster import load_cluster
from stitch.errors import Unavailable
from stitch.local.cluster import LocalCluster, import_models, keep_port, prepared
from stitch.local.run_folder import RunFolder
from stitch.tls import GATEWAY, Tls, load_tls
from tests.support.tcp_gate import TcpGate

START_SECONDS = 240.0
END_SECONDS = 30.0
POLL_SECONDS = 0.1
# The caller's name of a gate between a test's clients and a gateway.
CLIENT = "client"
NO_FLAGS: Mapping[str, Sequence[str]] = {}
Gates = dict[tuple[str, str], TcpGate]


@dataclass(slots=True)
class GatedCluster(LocalCluster):
    """A local cluster in which processes may have a cluster file and flags of their own, and with more gateways."""

    # By the name of a process.
    files: dict[str, Path] = field(default_factory=dict)
    flags: dict[str, Sequence[str]] = field(default_factory=dict)
    # The addresses, metrics ports and HTTP addresses of gateway-1, gateway-2, …
    more_gateways: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    # Shards of the cluster file that the test serves itself, or nobody.
    absent: frozenset[str] = frozenset()
    # A module that runs the programs: its first argument is the module of one. None: they run themselves.
    runner: str | None = None

    @property
    def names(self) -> list[str]:
        shards = [shard.name for shard in self.cluster.shards if shard.name not in self.absent]
        return [*shards, GATEWAY, *self.more_gateways]

    def awaited_routes(self) -> list[str]:
        return [] if self.absent else LocalCluster.awaited_routes(self)

    def address(self, name: str) -> str:
        return self.more_gateways[name][0] if name in self.more_gateways else LocalCluster.address(self, name)

    def metrics_port(self, name: str) -> int:
        return self.more_gateways[name][1] if name in self.more_gateways else LocalCluster.metrics_port(self, name)

    def command(self, name: str) -> tuple[str, list[str]]:
        if name in self.more_gateways:
            module, arguments = LocalCluster.command(self, GATEWAY)
            address, port, http = self.more_gateways[name]
            arguments += ["--listen", address, "--metrics-port", str(port), "--http", http]
        else:
            module, arguments = LocalCluster.command(self, name)
        if name in self.files:
            arguments[arguments.index(str(self.folder.cluster_file))] = str(self.files[name])
        arguments += self.flags.get(GATEWAY if name in self.more_gateways else name, ())
        return (module, arguments) if self.runner is None else (self.runner, [module, *arguments])

    def serves(self, name: str, tls: Tls | None) -> bool:
        if name not in self.more_gateways:
            return LocalCluster.serves(self, name, tls)
        return channels.serves(self.address(name), tls.gateway_client() if tls else None)

    def write_file_of(self, caller: str, gates: Gates) -> None:
        """Writes the cluster file of a process, in which gates replace the addresses of its neighbours."""
        fields = json.loads(self.folder.cluster_file.read_text())
        for shard in fields["shards"]:
            if (caller, shard["name"]) in gates:
                shard["address"] = gates[caller, shard["name"]].address
        self.files[caller] = self.folder.path / f"{caller}.json"
        self.files[caller].write_text(json.dumps(fields))


class Cluster:
    """A running cluster. Each process has the name of its shard, or the name `gateway`."""

    def __init__(self, local: GatedCluster, gates: Gates | None = None) -> None:
        self._local = local
        self._gates = gates or {}
        self._authority = local.cluster.gateway_endpoint[1]
        self._tls = load_tls(local.cluster.tls, local.cluster.folder, GATEWAY)
        self.client = Client(*local.cluster.gateway_endpoint)

    @property
    def gateway(self) -> str:
        """`host:port` of the gateway."""
        return self._local.gateway

    @property
    def http(self) -> str:
        """`host:port` of the gateway's HTTP port."""
        address = self._local.cluster.gateway.http
        assert address is not None
        return address

    @property
    def file(self) -> Path:
        """The cluster file that every process was started with."""
        return self._local.folder.cluster_file

    @property
    def names(self) -> list[str]:
        return self._local.names

    @property
    def gates(self) -> Gates:
        """The gates by caller and callee."""
        return self._gates

    def gate(self, caller: str, callee: str) -> TcpGate:
        """The gate on the connections from one process to another."""
        return self._gates[caller, callee]

    def address(self, name: str) -> str:
        """`host:port` of a process."""
        return self._local.address(name)

    def client_of(self, address: str) -> Client:
        """A client of the gateway, or of the gate before it, at that address."""
        return Client(address, self._authority)

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
        process = self._local.processes.get(name)
        return process is not None and process.running()

    def pause(self, name: str) -> None:
        """Sends SIGSTOP: the process keeps its connections and does not reply."""
        self.signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.signal(name, signal.SIGCONT)

    def terminate(self, name: str) -> None:
        """Sends SIGTERM: the process drains and then ends."""
        self.signal(name, signal.SIGTERM)

    def start(self, name: str, listen: str | None = None) -> None:
        """Starts a process, or an ended one again at the same address, and does not wait for it."""
        if listen is not None:
            self._local.listen[name] = listen
        self._local.start(name)

    @property
    def shards(self) -> list[dict[str, Any]]:
        """The shards of the cluster file."""
        return list(json.loads(self.file.read_text())["shards"])

    def write_shards(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the shards of the cluster file while the cluster runs; those that it loses are known still."""
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps({**json.loads(self.file.read_text()), "shards": shards}))
        draft.replace(self.file)
        known = {
            shard.name: shard for one in (self._local.cluster, load_cluster(str(self.file))) for shard in one.shards
        }
        self._local.cluster = self._local.cluster.model_copy(update={"shards": tuple(known.values())})

    def restart(self, *names: str) -> None:
        """Kills the processes where they still run, and starts them again at the same addresses.

        Returns once they serve, and the gateway reaches them.
        """
        for name in names:
            self.kill(name)
            self.start(name)
        self.wait_until_serving(*names)

    def wait_until_serving(self, *names: str) -> None:
        """Returns once these processes serve, and the gateway reaches every running shard."""
        self._local.wait_until_serving(list(names), _ignore, START_SECONDS)
        give_up = time.monotonic() + END_SECONDS
        while not self.all_serving():
            if time.monotonic() > give_up:
                raise TimeoutError(
                    f"the gateway does not reach every running shard {END_SECONDS:g} s after {', '.join(names)} serve"
                )
            time.sleep(POLL_SECONDS)

    def serves(self, name: str) -> bool:
        """Whether the process reports SERVING."""
        return self._local.serves(name, self._tls)

    def all_serving(self) -> bool:
        """Whether the gateway reaches every shard whose process runs."""
        try:
            shards = self.client.describe(timeout=END_SECONDS).shards
        except Unavailable:
            # A client whose gateway has restarted connects again after a pause.
            return False
        return all(shard.serving for shard in shards if self.running(shard.name))

    def metrics_address(self, name: str) -> str:
        """`host:port` of the metrics of a process."""
        return f"127.0.0.1:{self._local.metrics_port(name)}"

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
        url = f"http://{self.metrics_address(name)}/metrics"
        with urllib.request.urlopen(url, timeout=END_SECONDS) as reply:
            text = reply.read().decode()
        for family in text_string_to_metric_families(text):
            yield from family.samples


@contextmanager
def running_cluster(
    name_or_path: str | Path,
    folder: Path,
    gates: Iterable[tuple[str, str]] = (),
    gateways: int = 1,
    flags: Mapping[str, Sequence[str]] = NO_FLAGS,
    absent: Iterable[str] = (),
    runner: str | None = None,
) -> Iterator[Cluster]:
    """Runs a cluster of real processes on free ports, with its state and its logs in `folder`.

    `gates` are pairs of names, caller and callee: the caller reaches the callee through a gate. `CLIENT` as the caller
    makes a gate before a gateway. `flags` are further command-line arguments of processes by name; those of `gateway`
    apply to all gateways. `absent` names shards that are not started. `runner` is a module that runs the
    programs. Where the block fails, the last lines of every log are added to the error.
    """
    described = load_cluster(str(name_or_path))
    with ExitStack() as stack:
        # Its ports are kept from other programs also while a process is down.
        first = prepared(described, RunFolder(folder / described.name), stack)
        local = GatedCluster(first.folder, first.cluster, flags=dict(flags), absent=frozenset(absent), runner=runner)
        local.more_gateways = {
            f"{GATEWAY}-{number}": (f"127.0.0.1:{keep_port(stack)}", keep_port(stack), f"127.0.0.1:{keep_port(stack)}")
            for number in range(1, gateways)
        }
        import_models(local.cluster, _ignore_model)
        opened = {pair: stack.enter_context(TcpGate(local.address(pair[1]))) for pair in gates}
        for caller in {caller for caller, _ in opened} - {CLIENT}:
            local.write_file_of(caller, opened)
        local.start_all(_ignore, START_SECONDS)
        cluster = Cluster(local, opened)
        try:
            yield cluster
        except BaseException as error:
            for name in local.names:
                error.add_note(f"--- {name}\n{local.folder.last_lines(name)}")
            raise
        finally:
            for gate in opened.values():
                gate.heal()
            cluster.stop()


def _sample_name(name: str, labels: dict[str, str]) -> str:
    pairs = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{pairs}}}" if pairs else name


def _ignore(name: str, seconds: float) -> None:
    """Reports nothing."""


def _ignore_model(name: str, folder: str) -> None:
    """Reports nothing."""


__all__ = ["CLIENT", "GATEWAY", "Cluster", "running_cluster"]
