"""What `up` leaves behind is found again, and what is stale is recognised. Knows no network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest, Unavailable
from stitch.local.processes import LocalProcess
from stitch.local.run_folder import RunFolder, run_folder, running_clusters, the_running_cluster

pytestmark = pytest.mark.usefixtures("cache")


def this_process(name: str = "gateway") -> LocalProcess:
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return LocalProcess(name, os.getpid(), int(stat[19]))


def gone(name: str = "gateway") -> LocalProcess:
    return LocalProcess(name, pid=2**22 + 1, birth=1)


def begun(name: str = "smollm2", processes: tuple[LocalProcess, ...] = ()) -> RunFolder:
    folder = run_folder(name)
    folder.begin(load_cluster("smollm2").model_copy(update={"name": name}))
    folder.record(processes)
    return folder


def test_a_cluster_s_state_has_a_folder_in_the_cache(tmp_path: Path) -> None:
    assert run_folder("pair").path == tmp_path / "cache" / "run" / "pair"


def test_the_cluster_file_means_the_same_in_its_new_place() -> None:
    preset = load_cluster("smollm2")
    found = begun().cluster()
    assert found.stitch_file(found.route("weak")) == (preset.folder / "stitches/smollm2-15-20.safetensors").resolve()
    assert found.stitch_file(found.route("strong")) is None
    unchanged = {"routes", "folder"}
    assert found.model_dump(exclude=unchanged) == preset.model_dump(exclude=unchanged)


def test_a_model_s_folder_beside_the_cluster_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    models = {"bottom": {"id": "a", "source": "tiny"}, "top": {"id": "b", "source": "org/on-the-hub"}}
    fields = {**load_cluster("smollm2").model_dump(mode="json", exclude={"folder"}), "models": models}
    folder = run_folder("smollm2")
    folder.begin(ClusterConfig.model_validate({**fields, "folder": tmp_path}))
    assert folder.cluster().models.bottom.source == str(tmp_path / "tiny")
    assert folder.cluster().models.top.source == "org/on-the-hub"


def test_a_probe_beside_the_cluster_file_is_found(tmp_path: Path) -> None:
    gateway = {"address": "127.0.0.1:0", "probe": "probe.safetensors", "probe_thresholds": "thresholds.json"}
    fields = {**load_cluster("smollm2").model_dump(mode="json", exclude={"folder"}), "gateway": gateway}
    folder = run_folder("smollm2")
    folder.begin(ClusterConfig.model_validate({**fields, "folder": tmp_path}))
    assert folder.cluster().probe_file == tmp_path / "probe.safetensors"
    assert folder.cluster().probe_thresholds_file == tmp_path / "thresholds.json"


def test_processes_that_run_are_found_again_in_their_order() -> None:
    folder = begun(processes=(this_process("bottom-0"), gone("top-0"), this_process("gateway")))
    assert [process.name for process in folder.processes()] == ["bottom-0", "gateway"]


def test_a_cluster_whose_processes_are_gone_does_not_run() -> None:
    begun(processes=(gone(),))
    assert running_clusters() == []


def test_the_one_that_runs_is_found() -> None:
    begun("old", processes=(gone(),))
    folder = begun("new", processes=(this_process(),))
    assert the_running_cluster() == folder


def test_none_that_runs_is_an_error_with_a_way_out() -> None:
    with pytest.raises(Unavailable, match="no cluster runs on this machine: start one with `stitch up`"):
        the_running_cluster()


def test_several_that_run_are_named_with_their_addresses() -> None:
    for name in ("a", "b"):
        begun(name, processes=(this_process(),))
    with pytest.raises(InvalidRequest, match=r"several run .*: a \(127.0.0.1:0\), b \(127.0.0.1:0\)"):
        the_running_cluster()


def test_what_has_ended_is_forgotten() -> None:
    folder = begun(processes=(this_process(),))
    folder.end()
    folder.end()
    assert folder.processes() == []


def test_a_new_run_begins_with_empty_logs() -> None:
    folder = begun()
    folder.log("top-0").write_text("old")
    begun()
    assert not folder.log("top-0").exists()


def test_the_end_of_a_log_is_shown() -> None:
    folder = begun()
    folder.log("top-0").write_bytes(b"\n".join(b"line %d" % number for number in range(30)) + b"\n\xff")
    assert folder.last_lines("top-0", 3) == "line 28\nline 29\n�"
    assert folder.last_lines("bottom-0") == ""


def test_two_commands_never_start_one_cluster_together() -> None:
    with run_folder("pair").claimed():
        with pytest.raises(Unavailable, match="pair is being started by another command"), run_folder("pair").claimed():
            pass
        with run_folder("other").claimed():
            pass
    with run_folder("pair").claimed():
        pass


def test_the_record_holds_what_tells_processes_apart() -> None:
    folder = begun(processes=(gone("top-0"),))
    assert json.loads((folder.path / "processes.json").read_text()) == [{"name": "top-0", "pid": 2**22 + 1, "birth": 1}]
