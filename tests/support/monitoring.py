"""Debian's Prometheus and Alertmanager over a running cluster, and a webhook that records the alerts it is told.

Both are configured by the files in `deploy/prometheus`, with shorter waits and with the addresses of the test's
processes. They listen on ports that the system chooses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.processes import GATEWAY, Cluster
from tests.support.waiting import becomes_true

DEPLOYED = Path(__file__).parents[2] / "deploy/prometheus"
START_SECONDS = 30.0
END_SECONDS = 20.0


@dataclass
class Monitoring:
    """A running Prometheus, and what Alertmanager has told the webhook so far, oldest first."""

    url: str
    told: list[dict[str, Any]] = field(default_factory=list)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of a reply of Prometheus's API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=END_SECONDS) as reply:
            return json.load(reply)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression now."""
        data = self.get("query", query=expression)
        result: list[dict[str, Any]] = data["result"]
        return result

    @property
    def scraped(self) -> int:
        """How many processes have answered; Prometheus itself answers a while after it listens."""
        try:
            return len(self.query("up == 1"))
        except urllib.error.HTTPError:
            return 0

    def was_told(self, alert: str, status: str, **labels: str) -> bool:
        """Whether the webhook was told of that alert, `firing` or `resolved`, with these labels."""
        wanted = {"alertname": alert, **labels}
        return any(one["status"] == status and wanted.items() <= one["labels"].items() for one in self.told)


@contextmanager
def monitored(cluster: Cluster, folder: Path) -> Iterator[Monitoring]:
    """Runs both over the cluster within the block, once every process has been scraped; skips where they are absent."""
    prometheus = _program("prometheus")
    manager = _program("prometheus-alertmanager", "alertmanager")
    told: list[dict[str, Any]] = []
    with _webhook(told) as hook:
        config = _written(folder / "alertmanager.yml", _alertmanager(hook))
        flags = ["--storage.path", str(folder / "alertmanager"), "--cluster.listen-address", ""]
        with _running([manager, "--config.file", str(config), *flags], folder / "alertmanager.log") as address:
            config = _written(folder / "prometheus.yml", _prometheus(cluster, folder, address))
            flags = ["--storage.tsdb.path", str(folder / "data"), "--enable-feature", "exemplar-storage"]
            with _running([prometheus, "--config.file", str(config), *flags], folder / "prometheus.log") as served:
                monitoring = Monitoring(f"http://{served}", told)
                processes = len(cluster.names)
                if not becomes_true(lambda: monitoring.scraped == processes, START_SECONDS):
                    raise TimeoutError(f"not all of {processes} processes were scraped in {START_SECONDS:g} s")
                yield monitoring


def shortened(rules: dict[str, Any]) -> dict[str, Any]:
    """Groups of rules that wait for a second before they fire."""
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        if "for" in rule:
            rule["for"] = "1s"
    return rules


def _alertmanager(hook: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((DEPLOYED / "alertmanager.yml").read_text())
    config["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": hook}]
    return config


def _prometheus(cluster: Cluster, folder: Path, manager: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [manager]}]}]
    for name in config["rule_files"]:
        _written(folder / name, shortened(yaml.safe_load((DEPLOYED / name).read_text())))
    names = {"gateway": [GATEWAY], "shard": [name for name in cluster.names if name != GATEWAY]}
    # Without TLS: the metrics are on loopback.
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [cluster.metrics_address(name) for name in names[job]]}]}
        for job in (one["job_name"] for one in config["scrape_configs"])
    ]
    return config


def _written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def _program(*names: str) -> str:
    for name in names:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip(
        f"{names[0]} is not installed; Debian has it in the packages `prometheus` and `prometheus-alertmanager`"
    )


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[str]:
    """Runs a server, and yields the address at which it listens."""
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--web.listen-address", "127.0.0.1:0"], stdout=output, stderr=output)
    try:
        if not becomes_true(lambda: bool(_listening(process)), START_SECONDS):
            raise TimeoutError(f"{command[0]} does not listen:\n{log.read_text()[-2000:]}")
        yield f"127.0.0.1:{_listening(process)[0]}"
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listening(process: subprocess.Popen[bytes]) -> list[int]:
    """The ports at which a process listens. Raises RuntimeError where it has ended."""
    if process.poll() is not None:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    connections = psutil.Process(process.pid).net_connections("tcp")
    return [one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN]


@contextmanager
def _webhook(told: list[dict[str, Any]]) -> Iterator[str]:
    """Serves a webhook that appends every alert, and yields its URL."""

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.extend(json.loads(body)["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
