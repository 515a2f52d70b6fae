"""Brings a cluster up on this machine and down again. Doesn't know how it is shown to a person."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stitch.cluster import ClusterConfig
from stitch.errors import Unavailable
from stitch.local.health import serves
from stitch.local.ports import with_ports
from stitch.local.processes import LocalProcess, spawn, stop
from stitch.local.run_folder import RunFolder
from stitch.tls import load_tls

GATEWAY = "gateway"
POLL_SECONDS = 0.1
# Long enough for a large model from a slow disk.
START_SECONDS = 600.0
# More than the half minute that a gateway gives to running answers.
GRACE_SECONDS = 40.0

Serving = Callable[[str, float], None]
"""Told the name of a process that serves from now on, and the seconds since the start."""


@dataclass(slots=True)
class LocalCluster:
    """The processes of one cluster, by name: its shards, then `gateway`."""

    folder: RunFolder
    cluster: ClusterConfig
    processes: dict[str, LocalProcess] = field(default_factory=dict)

    @property
    def gateway(self) -> str:
        """Where clients reach it, `host:port`."""
        return self.cluster.gateway.address

    @property
    def names(self) -> list[str]:
        return [*(shard.name for shard in self.cluster.shards), GATEWAY]

    def address(self, name: str) -> str:
        """Where that process listens, `host:port`."""
        return self.gateway if name == GATEWAY else self.cluster.shard(name).address

    def metrics_port(self, name: str) -> int:
        place = self.cluster.gateway if name == GATEWAY else self.cluster.shard(name)
        return place.metrics_port

    def start(self, name: str) -> None:
        """Starts that process, and remembers it for later commands."""
        file = str(self.folder.cluster_file)
        module = "router_gateway.cli" if name == GATEWAY else "stitch_server.cli"
        arguments = ["run", file] if name == GATEWAY else ["run", file, "--shard", name]
        self.processes[name] = spawn(name, module, arguments, self.folder.log(name))
        self.folder.record(self.processes.values())

    def start_all(self, serving: Serving, timeout_seconds: float = START_SECONDS) -> None:
        """Starts every process and waits until all serve; where one doesn't, none is left."""
        try:
            for name in self.names:
                self.start(name)
            self.wait_until_serving(self.names, serving, timeout_seconds)
        except BaseException:
            self.stop(grace_seconds=1.0)
            raise

    def wait_until_serving(self, names: list[str], serving: Serving, timeout_seconds: float = START_SECONDS) -> None:
        """Waits for those processes; Unavailable where one ends instead, or the time is over."""
        begin = time.monotonic()
        tls = load_tls(self.cluster.tls, self.cluster.folder)
        credentials = tls.client() if tls else None
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                self.check_running(name)
                if serves(self.address(name), credentials):
                    waiting.remove(name)
                    serving(name, time.monotonic() - begin)
            if waiting and time.monotonic() - begin > timeout_seconds:
                raise Unavailable(f"{', '.join(waiting)} did not serve within {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def check_running(self, name: str) -> None:
        """Unavailable, with the end of its log, where that process has ended."""
        process = self.processes[name]
        if not process.running():
            ending = "" if process.exit_code is None else f" with exit code {process.exit_code}"
            log = f"its log, {self.folder.log(name)}, ends:\n{self.folder.last_lines(name)}"
            raise Unavailable(f"{name} has ended{ending}; {log}")

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Stops what runs, and forgets it: the gateway first, so that the shards have no answers left to finish."""
        gateway = [process for name, process in self.processes.items() if name == GATEWAY]
        shards = [process for name, process in self.processes.items() if name != GATEWAY]
        stop(gateway, grace_seconds)
        stop(shards[::-1], grace_seconds)
        self.folder.end()


def prepared(cluster: ClusterConfig, folder: RunFolder) -> LocalCluster:
    """The cluster with its ports found and its file written, and no process yet.

    Raises Unavailable where it runs already.
    """
    running = folder.processes()
    if running:
        names = ", ".join(process.name for process in running)
        raise Unavailable(f"{folder.name} runs already ({names}) at {folder.cluster().gateway.address}")
    folder.begin(with_ports(cluster))
    return LocalCluster(folder, folder.cluster())


def attached(folder: RunFolder) -> LocalCluster:
    """A cluster that an earlier command has started."""
    return LocalCluster(folder, folder.cluster(), {process.name: process for process in folder.processes()})


def import_models(cluster: ClusterConfig, imported: Callable[[str, str], None]) -> None:
    """Makes every model ready to load; the importer's progress goes to standard error as it comes.

    `imported` is told each model's id and folder. Raises Unavailable where one can't be had.
    """
    for source, name in {model.source: model.id for model in (cluster.models.bottom, cluster.models.top)}.items():
        command = [sys.executable, "-m", "stitch_server.cli", "import", source]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            raise Unavailable(f"the model {source} could not be imported")
        imported(name, result.stdout.strip())
