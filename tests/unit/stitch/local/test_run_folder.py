"""The run folder restores a cluster and recognises stale records."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest, Unavailable
from stitch.local.processes import LocalProcess, start_seconds
from stitch.local.run_folder import RunFolder, only_running_cluster, run_folder, running_clusters

pytestmark = pytest.mark.usefixtures("cache")


def this_process(name: str = "gateway") -> LocalProcess:
    return LocalProcess(name, os.getpid(), start_seconds(os.getpid()))


def gone(name: str = "gateway") -> LocalProcess:
    return LocalProcess(name, pid=2**22 + 1, start_seconds=1.0)


def started_folder(name: str = "smollm2", processes: tuple[LocalProcess, ...] = ()) -> RunFolder:
    folder = run_folder(name)
    folder.begin(load_cluster("smollm2").model_copy(update={"name": name}))
    folder.record(processes)
    return folder


def test_run_folder_is_in_cache(tmp_path: Path) -> None:
    assert run_folder("pair").path == tmp_path / "cache" / "run" / "pair"


def test_written_cluster_file_has_absolute_stitch_paths() -> None:
    preset = load_cluster("smollm2")
    found = started_folder().cluster()
    assert found.stitch_file(found.route("weak")) == (preset.folder / "stitches/smollm2-15-20.safetensors").resolve()
    assert found.stitch_file(found.route("strong")) is None
    unchanged = {"routes", "folder"}
    assert found.model_dump(exclude=unchanged) == preset.model_dump(exclude=unchanged)


def test_written_cluster_file_has_absolute_model_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    models = {"bottom": {"id": "a", "source": "tiny"}, "top": {"id": "b", "source": "org/on-the-hub"}}
    fields = {**load_cluster("smollm2").model_dump(mode="json", exclude={"folder"}), "models": models}
    folder = run_folder("smollm2")
    folder.begin(ClusterConfig.model_validate({**fields, "folder": tmp_path}))
    assert folder.cluster().models.bottom.source == str(tmp_path / "tiny")
    assert folder.cluster().models.top.source == "org/on-the-hub"


def test_written_cluster_file_has_absolute_probe_paths(tmp_path: Path) -> None:
    gateway = {"address": "127.0.0.1:0", "probe": "probe.safetensors", "probe_thresholds": "thresholds.json"}
    fields = {**load_cluster("smollm2").model_dump(mode="json", exclude={"folder"}), "gateway": gateway}
    folder = run_folder("smollm2")
    folder.begin(ClusterConfig.model_validate({**fields, "folder": tmp_path}))
    assert folder.cluster().probe_file == tmp_path / "probe.safetensors"
    assert folder.cluster().probe_thresholds_file == tmp_path / "thresholds.json"


def test_processes_returns_running_ones_in_order() -> None:
    folder = started_folder(processes=(this_process("bottom-0"), gone("top-0"), this_process("gateway")))
    assert [process.name for process in folder.processes()] == ["bottom-0", "gateway"]


def test_running_clusters_omits_cluster_without_processes() -> None:
    started_folder(processes=(gone(),))
    assert running_clusters() == []


def test_only_running_cluster_returns_it() -> None:
    started_folder("old", processes=(gone(),))
    folder = started_folder("new", processes=(this_process(),))
    assert only_running_cluster() == folder


def test_only_running_cluster_without_any_suggests_stitch_up() -> None:
    with pytest.raises(Unavailable, match="no cluster runs on this machine: start one with `stitch up`"):
        only_running_cluster()


def test_only_running_cluster_lists_several_with_addresses() -> None:
    for name in ("a", "b"):
        started_folder(name, processes=(this_process(),))
    with pytest.raises(InvalidRequest, match=r"several run .*: a \(127.0.0.1:0\), b \(127.0.0.1:0\)"):
        only_running_cluster()


def test_end_deletes_record_and_can_be_repeated() -> None:
    folder = started_folder(processes=(this_process(),))
    folder.end()
    folder.end()
    assert folder.processes() == []


def test_begin_deletes_previous_logs() -> None:
    folder = started_folder()
    folder.log("top-0").write_text("old")
    started_folder()
    assert not folder.log("top-0").exists()


def test_last_lines_returns_end_of_log() -> None:
    folder = started_folder()
    folder.log("top-0").write_bytes(b"\n".join(b"line %d" % number for number in range(30)) + b"\n\xff")
    assert folder.last_lines("top-0", 3) == "line 28\nline 29\n�"
    assert folder.last_lines("bottom-0") == ""


def test_locked_refuses_second_holder() -> None:
    with run_folder("pair").locked():
        with pytest.raises(Unavailable, match="pair is being started by another command"), run_folder("pair").locked():
            pass
        with run_folder("other").locked():
            pass
    with run_folder("pair").locked():
        pass


def test_record_holds_name_pid_and_start() -> None:
    folder = started_folder(processes=(gone("top-0"),))
    assert json.loads((folder.path / "processes.json").read_text()) == [
        {"name": "top-0", "pid": 2**22 + 1, "start_seconds": 1.0}
    ]
