"""Processes are started, recognised, stopped. Knows no cluster."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from stitch.local.processes import LocalProcess, spawn, stop

END_SECONDS = 20.0

SLEEPER = """
import signal, sys
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: print("not now", flush=True))
print("ready", flush=True)
while "brief" not in sys.argv:
    signal.pause()
sys.exit(3)
"""


@pytest.fixture(autouse=True)
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.chdir(tmp_path)


def started(tmp_path: Path, *arguments: str) -> LocalProcess:
    """A sleeper that has said that it is ready."""
    log = tmp_path / "sleeper.log"
    process = spawn("sleeper", "sleeper", arguments, log)
    while "ready" not in (log.read_text() if log.exists() else "") and not process.wait(0.01):
        pass
    return process


def test_a_process_runs_until_it_is_stopped(tmp_path: Path) -> None:
    process = started(tmp_path)
    assert process.running()
    stop([process], END_SECONDS)
    assert not process.running()
    assert process.exit_code == -signal.SIGTERM


def test_one_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path, "stubborn")
    stop([process], 0.2)
    assert process.exit_code == -signal.SIGKILL


def test_one_that_does_not_stop_holds_up_no_other(tmp_path: Path) -> None:
    stubborn, willing = started(tmp_path, "stubborn"), started(tmp_path)
    stop([stubborn, willing], 0.5)
    assert (stubborn.exit_code, willing.exit_code) == (-signal.SIGKILL, -signal.SIGTERM)


def test_one_that_is_paused_is_stopped(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send(signal.SIGSTOP)
    stop([process], END_SECONDS)
    assert process.exit_code == -signal.SIGTERM


def test_one_that_ends_by_itself_leaves_its_exit_code_and_its_output(tmp_path: Path) -> None:
    process = started(tmp_path, "brief")
    assert process.wait(END_SECONDS)
    assert process.exit_code == 3
    assert (tmp_path / "sleeper.log").read_text() == "ready\n"


def test_output_is_appended(tmp_path: Path) -> None:
    for _ in range(2):
        assert started(tmp_path, "brief").wait(END_SECONDS)
    assert (tmp_path / "sleeper.log").read_text() == "ready\nready\n"


def test_a_process_is_in_a_session_of_its_own(tmp_path: Path) -> None:
    process = started(tmp_path)
    assert os.getsid(process.pid) == process.pid
    stop([process], END_SECONDS)


def test_one_that_nobody_started_does_not_run() -> None:
    assert not LocalProcess("ghost", pid=2**22 + 1, birth=1).running()


def test_a_child_whose_exit_was_not_asked_for_does_not_run(tmp_path: Path) -> None:
    process = started(tmp_path, "brief")
    assert process.wait(END_SECONDS)
    again = LocalProcess(process.name, process.pid, process.birth)
    assert not again.running()
    assert again.exit_code is None


def parent_process() -> LocalProcess:
    """The one that started this test, which is not this test's child."""
    stat = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    return LocalProcess("parent", os.getppid(), int(stat[19]))


def test_a_process_of_another_program_is_watched_too() -> None:
    assert parent_process().running()


def test_another_process_that_got_the_same_id_is_not_mistaken_for_it() -> None:
    parent = parent_process()
    assert parent.birth is not None
    earlier = replace(parent, birth=parent.birth - 1)
    # Were it mistaken, this test would be stopped with what started it.
    assert not earlier.running()
    stop([earlier], END_SECONDS)
    assert parent.running()
