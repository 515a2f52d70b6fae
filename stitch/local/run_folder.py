"""The files of a cluster on this machine between `up` and `down`: its configuration, its processes, their logs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stitch.cluster import ClusterConfig, load_cluster
from stitch.environment import cache_folder, private_folder
from stitch.errors import InvalidRequest, Unavailable
from stitch.local.processes import LocalProcess


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`run/<cluster>/` in the cache: the resolved cluster file, the record of the processes, their logs."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def cluster_file(self) -> Path:
        return self.path / "cluster.json"

    @property
    def _processes_file(self) -> Path:
        return self.path / "processes.json"

    def log(self, process: str) -> Path:
        """The file with that process's output."""
        return self.path / "logs" / f"{process}.log"

    def last_lines(self, process: str, count: int = 12) -> str:
        """The end of that process's log."""
        log = self.log(process)
        return (
            "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]) if log.exists() else ""
        )

    def begin(self, cluster: ClusterConfig) -> None:
        """Writes the cluster file that every process is started with, and deletes the logs of the previous run."""
        private_folder(self.path)
        (self.path / "logs").mkdir(exist_ok=True)
        for log in self.path.glob("logs/*.log"):
            log.unlink()
        self.cluster_file.write_text(json.dumps(_portable(cluster), indent=2) + "\n")

    def record(self, processes: Iterable[LocalProcess]) -> None:
        """Writes the processes down for later commands."""
        records = [{key: value for key, value in asdict(one).items() if key != "exit_code"} for one in processes]
        draft = self._processes_file.with_suffix(".draft")
        draft.write_text(json.dumps(records, indent=2) + "\n")
        draft.replace(self._processes_file)

    def processes(self) -> list[LocalProcess]:
        """The recorded processes that still run, in the order of their start."""
        if not self._processes_file.exists():
            return []
        recorded = [LocalProcess(**fields) for fields in json.loads(self._processes_file.read_bytes())]
        return [process for process in recorded if process.running()]

    def end(self) -> None:
        """Deletes the record of the processes and keeps the logs."""
        self._processes_file.unlink(missing_ok=True)

    def cluster(self) -> ClusterConfig:
        """The cluster's configuration as it was started."""
        return load_cluster(str(self.cluster_file))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the cluster's lock for the block; raises Unavailable where another `stitch up` holds it."""
        private_folder(self.path)
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise Unavailable(f"{self.name} is being started by another command right now") from error
        try:
            yield
        finally:
            lock.release()


def run_folder(cluster_name: str) -> RunFolder:
    """The folder of the cluster with that name, which need not exist."""
    return RunFolder(cache_folder() / "run" / cluster_name)


def running_clusters() -> list[RunFolder]:
    """The clusters of this machine with at least one running process."""
    folders = [RunFolder(path.parent) for path in sorted((cache_folder() / "run").glob("*/processes.json"))]
    return [folder for folder in folders if folder.processes()]


def only_running_cluster() -> RunFolder:
    """The one cluster that runs on this machine; raises Unavailable for none, InvalidRequest for several."""
    match running_clusters():
        case []:
            raise Unavailable("no cluster runs on this machine: start one with `stitch up`, or name a --gateway")
        case [folder]:
            return folder
        case several:
            known = ", ".join(f"{folder.name} ({folder.cluster().gateway.address})" for folder in several)
            raise InvalidRequest("cluster", None, f"several run on this machine; name one of: {known}")


def _portable(cluster: ClusterConfig) -> dict[str, Any]:
    """The cluster's fields with absolute paths, so that the file can be read from another folder."""
    fields = cluster.model_dump(mode="json", exclude={"folder"})
    for route, config in zip(fields["routes"], cluster.routes, strict=True):
        file = cluster.stitch_file(config)
        route["stitch"] = str(file.resolve()) if file else None
        if (gates := cluster.ffn_skip_file(config)) is not None:
            route["ffn_skip"]["file"] = str(gates.resolve())
    for name in ("router", "router_thresholds", "probe", "probe_thresholds", "keys"):
        if fields["gateway"][name] is not None:
            fields["gateway"][name] = str((cluster.folder / fields["gateway"][name]).resolve())
    for name, file in (fields["tls"] or {}).items():
        if isinstance(file, str):
            fields["tls"][name] = str((cluster.folder / file).resolve())
    for model in fields["models"].values():
        source = cluster.folder / model["source"]
        if source.exists():
            model["source"] = str(source.resolve())
    return fields
