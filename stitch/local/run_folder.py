"""What a cluster on this machine leaves on disk between `up` and `down`. Knows no network."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stitch.cluster import ClusterConfig, load_cluster
from stitch.environment import cache_folder
from stitch.errors import InvalidRequest, Unavailable
from stitch.local.processes import LocalProcess


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`run/<cluster>/` in the cache: the resolved cluster file, the processes, their logs."""

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
        """Where that process writes."""
        return self.path / "logs" / f"{process}.log"

    def last_lines(self, process: str, count: int = 12) -> str:
        """The end of its log."""
        log = self.log(process)
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:]) if log.exists() else ""

    def begin(self, cluster: ClusterConfig) -> None:
        """Writes the cluster file that every process is started with, and clears the logs of the run before."""
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        for log in self.path.glob("logs/*.log"):
            log.unlink()
        self.cluster_file.write_text(json.dumps(_portable(cluster), indent=2) + "\n")

    def record(self, processes: Iterable[LocalProcess]) -> None:
        """Remembers the processes for the commands that come after this one."""
        records = [{key: value for key, value in asdict(one).items() if key != "exit_code"} for one in processes]
        draft = self._processes_file.with_suffix(".draft")
        draft.write_text(json.dumps(records, indent=2) + "\n")
        draft.replace(self._processes_file)

    def processes(self) -> list[LocalProcess]:
        """The recorded processes that run still, in the order of their start."""
        if not self._processes_file.exists():
            return []
        recorded = [LocalProcess(**fields) for fields in json.loads(self._processes_file.read_text())]
        return [process for process in recorded if process.running()]

    def end(self) -> None:
        """Forgets the processes; the logs stay."""
        self._processes_file.unlink(missing_ok=True)

    def cluster(self) -> ClusterConfig:
        """The cluster as it was started."""
        return load_cluster(str(self.cluster_file))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps a second `stitch up` of this cluster out; Unavailable where one is at work already."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Unavailable(f"{self.name} is being started by another command right now") from error
            yield


def run_folder(cluster_name: str) -> RunFolder:
    """The folder of the cluster of that name, whether it exists or not."""
    return RunFolder(cache_folder() / "run" / cluster_name)


def running_clusters() -> list[RunFolder]:
    """The clusters on this machine with at least one process that runs."""
    folders = [RunFolder(path.parent) for path in sorted((cache_folder() / "run").glob("*/processes.json"))]
    return [folder for folder in folders if folder.processes()]


def the_running_cluster() -> RunFolder:
    """The one cluster that runs here; Unavailable where there is none, InvalidRequest where there are several."""
    match running_clusters():
        case []:
            raise Unavailable("no cluster runs on this machine: start one with `stitch up`, or name a --gateway")
        case [folder]:
            return folder
        case several:
            known = ", ".join(f"{folder.name} ({folder.cluster().gateway.address})" for folder in several)
            raise InvalidRequest("cluster", None, f"several run on this machine; name one of: {known}")


def _portable(cluster: ClusterConfig) -> dict[str, Any]:
    """The cluster's fields with absolute paths, so that the file means the same in another folder."""
    fields = cluster.model_dump(mode="json", exclude={"folder"})
    for route, cut in zip(fields["routes"], cluster.routes, strict=True):
        file = cluster.stitch_file(cut)
        route["stitch"] = str(file.resolve()) if file else None
    for name in ("router", "router_thresholds", "probe", "probe_thresholds"):
        if fields["gateway"][name] is not None:
            fields["gateway"][name] = str((cluster.folder / fields["gateway"][name]).resolve())
    for name, file in (fields["tls"] or {}).items():
        fields["tls"][name] = str((cluster.folder / file).resolve())
    for model in fields["models"].values():
        source = cluster.folder / model["source"]
        if source.exists():
            model["source"] = str(source.resolve())
    return fields
