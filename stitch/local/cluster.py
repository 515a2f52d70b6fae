"""Starts a cluster on this machine and stops it: free ports first, then its shards and its gateway as processes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from stitch.cluster import ClusterConfig, GatewayConfig, ShardConfig
from stitch.errors import InvalidRequest, Unavailable
from stitch.health import program_serves, route_serves
from stitch.local.processes import LocalProcess, spawn, stop
from stitch.local.run_folder import RunFolder
from stitch.tls import GATEWAY, Tls, load_tls

POLL_SECONDS = 0.1
# Long enough for a large model from a slow disk.
START_SECONDS = 600.0
# For the gateway to reach the shards of every route once all processes serve.
ROUTES_SECONDS = 60.0
# Between two reports of the processes that don't serve yet.
WAITING_SECONDS = 10.0
# Longer than the 30 s in which a gateway drains.
GRACE_SECONDS = 40.0

Serving = Callable[[str, float], None]
"""Called with the name of each process when it serves, and the seconds since the start."""

Waiting = Callable[[str, float, str], None]
"""Called now and then with each process that doesn't serve yet, the seconds since the start, its log's last line."""

Endpoint = TypeVar("Endpoint", ShardConfig, GatewayConfig)


@dataclass(slots=True)
class LocalCluster:
    """The processes of one cluster by name: its shards, then `gateway`."""

    folder: RunFolder
    cluster: ClusterConfig
    processes: dict[str, LocalProcess] = field(default_factory=dict)
    # Where a shard listens, if that isn't its address in the cluster file, as where a proxy has that one.
    listen: dict[str, str] = field(default_factory=dict)

    @property
    def gateway(self) -> str:
        """The address for clients, `host:port`."""
        return self.cluster.gateway.address

    @property
    def names(self) -> list[str]:
        return [*(shard.name for shard in self.cluster.shards), GATEWAY]

    def awaited_routes(self) -> list[str]:
        """The routes that the gateway serves once every process does."""
        return [route.name for route in self.cluster.routes]

    def address(self, name: str) -> str:
        """The address of that process, `host:port`."""
        return self.gateway if name == GATEWAY else self.cluster.shard(name).address

    def metrics_port(self, name: str) -> int:
        config = self.cluster.gateway if name == GATEWAY else self.cluster.shard(name)
        return config.metrics_port

    def start(self, name: str) -> None:
        """Starts that process and records it for later commands."""
        self.processes[name] = spawn(name, *self.command(name), self.folder.log(name))
        self.folder.record(self.processes.values())

    def command(self, name: str) -> tuple[str, list[str]]:
        """The module that the process runs, and its arguments."""
        file = str(self.folder.cluster_file)
        if name == GATEWAY:
            return "router_gateway.cli", ["run", file]
        listen = ["--listen", self.listen[name]] if name in self.listen else []
        return "stitch_server.cli", ["run", file, "--shard", name, *listen]

    def serves(self, name: str, tls: Tls | None) -> bool:
        """Whether the process reports SERVING to a program with these certificates."""
        return program_serves(self.cluster, name, tls)

    def start_all(
        self, on_serving: Serving, timeout_seconds: float = START_SECONDS, on_waiting: Waiting | None = None
    ) -> None:
        """Starts every process and waits until all serve, and the gateway every route; stops all where one doesn't."""
        try:
            for name in self.names:
                self.start(name)
            self.wait_until_serving(self.names, on_serving, timeout_seconds, on_waiting)
            self._wait_for_routes()
        except BaseException:
            self.stop(grace_seconds=1.0)
            raise

    def wait_until_serving(
        self,
        names: list[str],
        on_serving: Serving,
        timeout_seconds: float = START_SECONDS,
        on_waiting: Waiting | None = None,
    ) -> None:
        """Waits until those processes serve; raises Unavailable where one ends instead, or the time is over."""
        begin = reported = time.monotonic()
        tls = load_tls(self.cluster.tls, self.cluster.folder, GATEWAY)
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                self.check_running(name)
                if self.serves(name, tls):
                    waiting.remove(name)
                    on_serving(name, time.monotonic() - begin)
            now = time.monotonic()
            if waiting and now - begin > timeout_seconds:
                raise self._not_serving(waiting, timeout_seconds)
            if on_waiting and now - reported >= WAITING_SECONDS:
                reported = now
                for name in waiting:
                    on_waiting(name, now - begin, self.folder.last_lines(name, 1))
            time.sleep(POLL_SECONDS)

    def _wait_for_routes(self) -> None:
        """Waits until the gateway has reached the shards of every route, which may serve before it asks them again."""
        give_up = time.monotonic() + ROUTES_SECONDS
        tls = load_tls(self.cluster.tls, self.cluster.folder, GATEWAY)
        for route in self.awaited_routes():
            while not route_serves(self.cluster, route, tls):
                for name in self.names:
                    self.check_running(name)
                if time.monotonic() > give_up:
                    raise Unavailable(f"the gateway did not serve route {route} within {ROUTES_SECONDS:g} s")
                time.sleep(POLL_SECONDS)

    def _not_serving(self, names: list[str], timeout_seconds: float) -> Unavailable:
        logs = "".join(f"\n{name}: {self.folder.last_lines(name, 1) or 'its log is empty'}" for name in names)
        return Unavailable(f"{', '.join(names)} did not serve within {timeout_seconds:g} s; their logs end:{logs}")

    def check_running(self, name: str) -> None:
        """Raises Unavailable with the end of the log where that process has ended."""
        process = self.processes[name]
        if not process.running():
            ending = "" if process.exit_code is None else f" with exit code {process.exit_code}"
            log = f"its log, {self.folder.log(name)}, ends:\n{self.folder.last_lines(name)}"
            raise Unavailable(f"{name} has ended{ending}; {log}")

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Stops every process and deletes the record: the gateway first, which drains while the shards still serve."""
        gateway = [process for name, process in self.processes.items() if name == GATEWAY]
        shards = [process for name, process in self.processes.items() if name != GATEWAY]
        stop(gateway, grace_seconds)
        stop(shards[::-1], grace_seconds)
        self.folder.end()


def prepared(cluster: ClusterConfig, folder: RunFolder, bound: ExitStack) -> LocalCluster:
    """A cluster with free ports and a written cluster file, before any process starts.

    The ports are kept for it until `bound` closes. Raises Unavailable where it runs already.
    """
    running = folder.processes()
    if running:
        names = ", ".join(process.name for process in running)
        raise Unavailable(f"{folder.name} runs already ({names}) at {folder.cluster().gateway.address}")
    folder.begin(with_ports(cluster, bound))
    return LocalCluster(folder, folder.cluster())


def attached(folder: RunFolder) -> LocalCluster:
    """The cluster that an earlier command has started."""
    return LocalCluster(folder, folder.cluster(), {process.name: process for process in folder.processes()})


def import_models(cluster: ClusterConfig, imported: Callable[[str, str], None]) -> None:
    """Imports both models, so that shards can load them; the importer reports its progress on standard error.

    Calls `imported` with each model's id and folder. Raises Unavailable where an import fails.
    """
    for source, name in {
        model.pinned_source: model.id for model in (cluster.models.bottom, cluster.models.top)
    }.items():
        command = [sys.executable, "-m", "stitch_server.cli", "import", source]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            raise Unavailable(f"the model {source} could not be imported")
        imported(name, result.stdout.strip())


def with_ports(cluster: ClusterConfig, bound: ExitStack) -> ClusterConfig:
    """The cluster with a free port in place of every 0; until `bound` closes, no other program is given its ports.

    Raises InvalidRequest for an address that is not of this machine, or whose port is in use.
    """
    shards = tuple(_with_ports(bound, shard.name, shard) for shard in cluster.shards)
    gateway = _with_http_port(bound, _with_ports(bound, GATEWAY, cluster.gateway))
    return cluster.model_copy(update={"shards": shards, "gateway": gateway})


def _with_ports(bound: ExitStack, name: str, config: Endpoint) -> Endpoint:
    address = _kept_address(bound, f"{name}.address", config.address)
    metrics_port = _keep_port(bound, f"{name}.metrics_port", config.metrics_host, config.metrics_port)
    return config.model_copy(update={"address": address, "metrics_port": metrics_port})


def _with_http_port(bound: ExitStack, config: GatewayConfig) -> GatewayConfig:
    if config.http is None:
        return config
    return config.model_copy(update={"http": _kept_address(bound, "gateway.http", config.http)})


def _kept_address(bound: ExitStack, field: str, address: str) -> str:
    """The address with a free port in place of 0, which is bound until `bound` closes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(field, address, "it must be host:port")
    return f"{host}:{_keep_port(bound, field, host, int(port))}"


def _keep_port(bound: ExitStack, field: str, host: str, port: int) -> int:
    try:
        return keep_port(bound, host, port)
    except OSError as error:
        raise InvalidRequest(field, f"{host}:{port}", f"this machine can't listen there: {error.strerror}") from error


def keep_port(bound: ExitStack, host: str = "127.0.0.1", port: int = 0) -> int:
    """Binds the port, any free one for 0, until `bound` closes, and returns it.

    It doesn't listen, so a server can, since servers set SO_REUSEADDR. Raises OSError where one listens already.
    """
    bare = host.removeprefix("[").removesuffix("]")
    kept = bound.enter_context(socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET))
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind((bare, port))
    return int(kept.getsockname()[1])
