"""Local processes are spawned, identified and stopped."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from stitch.local.processes import LocalProcess, spawn, start_seconds, stop

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
    """A sleeper that has printed `ready`."""
    log = tmp_path / "sleeper.log"
    process = spawn("sleeper", "sleeper", arguments, log)
    while "ready" not in (log.read_text() if log.exists() else "") and not process.wait(0.01):
        pass
    return process


def test_process_runs_until_stopped(tmp_path: Path) -> None:
    process = started(tmp_path)
    assert process.running()
    stop([process], END_SECONDS)
    assert not process.running()
    assert process.exit_code == -signal.SIGTERM


def test_stop_kills_process_that_ignores_sigterm(tmp_path: Path) -> None:
    process = started(tmp_path, "stubborn")
    stop([process], 0.2)
    assert process.exit_code == -signal.SIGKILL


def test_stop_ends_other_processes_when_one_ignores_sigterm(tmp_path: Path) -> None:
    stubborn, willing = started(tmp_path, "stubborn"), started(tmp_path)
    stop([stubborn, willing], 0.5)
    assert (stubborn.exit_code, willing.exit_code) == (-signal.SIGKILL, -signal.SIGTERM)


def test_stop_ends_paused_process(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send(signal.SIGSTOP)
    stop([process], END_SECONDS)
    assert process.exit_code == -signal.SIGTERM


def test_ended_process_has_exit_code_and_log(tmp_path: Path) -> None:
    process = started(tmp_path, "brief")
    assert process.wait(END_SECONDS)
    assert process.exit_code == 3
    assert (tmp_path / "sleeper.log").read_text() == "ready\n"


def test_spawn_appends_to_log(tmp_path: Path) -> None:
    for _ in range(2):
        assert started(tmp_path, "brief").wait(END_SECONDS)
    assert (tmp_path / "sleeper.log").read_text() == "ready\nready\n"


def test_spawned_process_leads_its_own_session(tmp_path: Path) -> None:
    process = started(tmp_path)
    assert os.getsid(process.pid) == process.pid
    stop([process], END_SECONDS)


def test_unknown_pid_does_not_run() -> None:
    assert not LocalProcess("ghost", pid=2**22 + 1, start_seconds=1.0).running()


def test_reaped_child_does_not_run(tmp_path: Path) -> None:
    process = started(tmp_path, "brief")
    assert process.wait(END_SECONDS)
    again = LocalProcess(process.name, process.pid, process.start_seconds)
    assert not again.running()
    assert again.exit_code is None


def parent_process() -> LocalProcess:
    """The process that started this test, which is no child of this test."""
    return LocalProcess("parent", os.getppid(), start_seconds(os.getppid()))


def test_process_of_other_parent_runs() -> None:
    assert parent_process().running()


def test_process_with_same_id_and_other_start_does_not_run() -> None:
    parent = parent_process()
    assert parent.start_seconds is not None
    earlier = replace(parent, start_seconds=parent.start_seconds - 0.01)
    # If the two were confused, `stop` would end this test's parent.
    assert not earlier.running()
    stop([earlier], END_SECONDS)
    assert parent.running()


def test_start_seconds_is_none_for_zombie(tmp_path: Path) -> None:
    process = spawn("sleeper", "sleeper", ["brief"], tmp_path / "sleeper.log")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_seconds(process.pid) is None
    assert process.wait(END_SECONDS)
