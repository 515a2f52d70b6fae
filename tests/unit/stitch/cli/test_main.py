"""The command as a whole: usage, failures, interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from stitch.cli.main import main, parser
from stitch.errors import Unavailable
from tests.support.fake_gateway import WAIT_SECONDS, FakeGateway

ROOT = Path(__file__).parents[3]
VERBS = ["up", "down", "ask", "chat", "batch", "status", "ttft", "demo"]


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(parsed: Any) -> int:
        raise error

    monkeypatch.setattr(import_module("stitch.cli.status"), "run", run)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args([verb, "--help"])
    assert caught.value.code == 0
    assert f"stitch {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["sing"], ["ask"], ["ask", "x", "--max-tokens", "many"], ["batch", "f"], ["ttft", "--lengths", "32"]],
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: stitch" in capsys.readouterr().err


def test_failure_exits_with_1_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, Unavailable("top-0 is gone"))
    assert main(["status"]) == 1
    assert capsys.readouterr() == ("", "stitch: top-0 is gone\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.jsonl"), "No such file or directory: 'x.jsonl'"),
        (ModuleNotFoundError("No module named 'rich'"), "install stitch-serving[all]"),
    ],
)
def test_failure_of_environment_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    fail_with(monkeypatch, error)
    assert main(["status"]) == 1
    assert message in capsys.readouterr().err


def test_defect_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("x"))
    with pytest.raises(ZeroDivisionError):
        main(["status"])


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["status"]) == 130


def test_ctrl_c_inside_lock_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("cannot release un-acquired lock")
    error.__context__ = KeyboardInterrupt()
    fail_with(monkeypatch, error)
    assert main(["status"]) == 130


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arguments", [["status"], ["ask", "x"], ["ttft"], ["down"]])
def test_verbs_without_cluster_suggest_stitch_up(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert "no cluster runs on this machine: start one with `stitch up`" in capsys.readouterr().err


def test_missing_gateway_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--gateway", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("stitch: ")
    assert error.count("\n") == 1


def test_ctrl_c_cancels_call(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 2
    command = [sys.executable, "-m", "stitch.cli.main", "ask", "a b c d", "--gateway", gateway.address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as asking:
        assert asking.stdout is not None
        # The route decision is a line of its own; the answer follows it.
        assert asking.stdout.readline().startswith(b"route weak")
        assert asking.stdout.read(5) == b"echo:"
        asking.send_signal(signal.SIGINT)
        _, errors = asking.communicate(timeout=WAIT_SECONDS)
    assert (asking.returncode, errors) == (130, b"")
    assert gateway.cancelled.wait(WAIT_SECONDS)
