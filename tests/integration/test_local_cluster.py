"""`LocalCluster` starts, watches and stops fake programs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from stitch.channels import serves
from stitch.client import Client
from stitch.cluster import load_cluster
from stitch.errors import Unavailable
from stitch.local.cluster import LocalCluster, attached, import_models, prepared
from stitch.local.processes import LocalProcess
from stitch.local.run_folder import run_folder, running_clusters
from stitch.tls import GATEWAY
from tests.support.fake_programs import DYING, LOADING, STUBBORN, UNREACHED

pytestmark = pytest.mark.usefixtures("programs")
START_SECONDS = 60.0
Prepare = Callable[[], LocalCluster]


@pytest.fixture
def local(programs: None) -> Iterator[Prepare]:
    """Prepares a cluster of fake programs, whose ports are kept for the length of the test."""
    with ExitStack() as bound:
        yield lambda: prepared(load_cluster("smollm2"), run_folder("smollm2"), bound)


def ignore(name: str, seconds: float) -> None:
    pass


def test_local_cluster_starts_answers_and_stops(local: Prepare) -> None:
    cluster = local()
    served: list[str] = []
    cluster.start_all(lambda name, seconds: served.append(name), START_SECONDS)
    try:
        assert sorted(served) == ["bottom-0", "gateway", "top-0"]
        assert [folder.name for folder in running_clusters()] == ["smollm2"]
        with Client(cluster.gateway) as client:
            assert client.generate("hi").text == "echo: hi"
    finally:
        cluster.stop()
    assert [process.exit_code for process in cluster.processes.values()] == [-signal.SIGTERM] * 3
    assert running_clusters() == []
    assert not serves(cluster.gateway)


def test_attached_cluster_can_be_stopped(local: Prepare) -> None:
    cluster = local()
    cluster.start_all(ignore, START_SECONDS)
    later = attached(run_folder("smollm2"))
    assert later.gateway == cluster.gateway
    assert list(later.processes) == ["bottom-0", "top-0", "gateway"]
    later.stop()
    assert running_clusters() == []


def test_running_cluster_is_not_prepared_again(local: Prepare) -> None:
    cluster = local()
    cluster.start_all(ignore, START_SECONDS)
    try:
        message = rf"smollm2 runs already \(bottom-0, top-0, gateway\) at {cluster.gateway}"
        with pytest.raises(Unavailable, match=message):
            local()
    finally:
        cluster.stop()


def test_stale_run_folder_does_not_prevent_a_start(local: Prepare) -> None:
    cluster = local()
    cluster.folder.record([LocalProcess(GATEWAY, pid=2**22 + 1, start_seconds=1.0)])
    local().start_all(ignore, START_SECONDS)
    attached(run_folder("smollm2")).stop()


def test_early_exit_is_reported_with_last_log_lines(local: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DYING, "top-0")
    cluster = local()
    with pytest.raises(Unavailable, match="top-0 has ended with exit code 3") as caught:
        cluster.start_all(ignore, START_SECONDS)
    assert str(caught.value).endswith("top-0 begins\nthere is no room for my weights")
    assert not any(process.running() for process in cluster.processes.values())
    assert running_clusters() == []


def test_start_timeout_names_the_processes_that_do_not_serve(local: Prepare) -> None:
    cluster = local()
    with pytest.raises(Unavailable, match=r"bottom-0, top-0, gateway did not serve within 0 s; their logs end:"):
        cluster.start_all(ignore, timeout_seconds=0)
    assert running_clusters() == []


def test_routes_that_the_gateway_does_not_reach_are_named(local: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNREACHED, "weak")
    monkeypatch.setattr("stitch.local.cluster.ROUTES_SECONDS", 1.0)
    with pytest.raises(Unavailable, match="the gateway did not serve route weak within 1 s"):
        local().start_all(ignore, START_SECONDS)
    assert running_clusters() == []


def test_slow_start_is_reported_with_last_log_line(
    local: Prepare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LOADING, "top-0")
    monkeypatch.setattr("stitch.local.cluster.WAITING_SECONDS", 1.0)
    reports: list[tuple[str, str]] = []

    def on_waiting(name: str, seconds: float, line: str) -> None:
        assert seconds >= 1.0
        reports.append((name, line))

    with pytest.raises(Unavailable, match=r"top-0 did not serve within 8 s; their logs end:\ntop-0: weights: 3 of 7 ü"):
        local().start_all(ignore, 8.0, on_waiting)
    assert reports[-1] == ("top-0", "weights: 3 of 7 ü")
    assert running_clusters() == []


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_local_cluster_starts_with_a_proxy_in_the_environment(
    local: Prepare, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    cluster = local()
    cluster.start_all(ignore, START_SECONDS)
    try:
        with Client(cluster.gateway) as client:
            assert client.generate("hi").text == "echo: hi"
    finally:
        cluster.stop()


def test_process_that_ignores_sigterm_is_killed(local: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STUBBORN, "bottom-0")
    cluster = local()
    cluster.start_all(ignore, START_SECONDS)
    cluster.stop(grace_seconds=1.0)
    codes = {name: process.exit_code for name, process in cluster.processes.items()}
    assert codes == {"bottom-0": -signal.SIGKILL, "top-0": -signal.SIGTERM, "gateway": -signal.SIGTERM}
    assert "not now" in cluster.folder.last_lines("bottom-0")


def test_killed_process_can_be_started_again(local: Prepare) -> None:
    cluster = local()
    cluster.start_all(ignore, START_SECONDS)
    try:
        first = cluster.processes["top-0"]
        first.send(signal.SIGKILL)
        assert first.wait(START_SECONDS)
        with pytest.raises(Unavailable, match="top-0 has ended with exit code -9"):
            cluster.check_running("top-0")
        cluster.start("top-0")
        cluster.wait_until_serving(["top-0"], ignore, START_SECONDS)
        assert cluster.processes["top-0"].pid != first.pid
        assert [process.pid for process in run_folder("smollm2").processes()] == [
            process.pid for process in cluster.processes.values()
        ]
    finally:
        cluster.stop()


def test_every_process_has_its_own_address_and_metrics_port(local: Prepare) -> None:
    cluster = local()
    addresses = {cluster.address(name) for name in cluster.names}
    assert len(addresses) == 3
    assert len({cluster.metrics_port(name) for name in cluster.names} - {0}) == 3


def test_each_distinct_model_is_imported_once(capfd: pytest.CaptureFixture[str]) -> None:
    preset = load_cluster("smollm2")
    other = preset.models.top.model_copy(update={"id": "org/other", "source": "other", "sha256": None})
    found: list[tuple[str, str]] = []
    import_models(preset, lambda name, folder: found.append((name, folder)))
    models = preset.models.model_copy(update={"top": other})
    import_models(preset.model_copy(update={"models": models}), lambda name, folder: found.append((name, folder)))
    first = (preset.models.bottom.id, f"/models/{preset.models.bottom.pinned_source}")
    assert found == [first, first, ("org/other", "/models/other")]
    # Progress is for the terminal.
    assert capfd.readouterr().err.splitlines()[-1] == "importing other"


def test_failed_import_names_the_model() -> None:
    preset = load_cluster("smollm2")
    nowhere = preset.models.top.model_copy(update={"source": "nowhere", "sha256": None})
    models = preset.models.model_copy(update={"bottom": nowhere, "top": nowhere})
    with pytest.raises(Unavailable, match="the model nowhere could not be imported"):
        import_models(preset.model_copy(update={"models": models}), ignore_model)


def ignore_model(name: str, folder: str) -> None:
    pass
