"""How flags are read, and what a failed verb leaves behind."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser

import pytest

from stitch.errors import InvalidRequest, Unavailable
from stitch_training.router_arguments import add_data, named, named_numbers, said


def test_pairs_are_names_and_values() -> None:
    assert named(["a=b", "c=d=e"], "rename") == {"a": "b", "c": "d=e"}
    assert named([], "rename") == {}


@pytest.mark.parametrize("pair", ["a", "=b", "a=", ""])
def test_what_is_no_pair_is_refused_by_its_flag(pair: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        named([pair], "rename")
    assert (refused.value.field, refused.value.value) == ("rename", pair)


def test_numbers_are_numbers_and_nothing_is_none() -> None:
    assert named_numbers(["a=1e3", "b=2"], "costs") == {"a": 1000.0, "b": 2.0}
    assert named_numbers([], "costs") is None


def failing(error: Exception) -> int:
    def command() -> None:
        raise error

    return said(command)


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidRequest("data", "x", "it is none"), 2), (Unavailable("gone"), 1), (OSError("disk full"), 1)],
)
def test_a_failure_is_one_sentence_and_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == status
    assert capsys.readouterr().err == f"router-gateway: {error}\n"


def test_a_mistake_in_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


def test_files_are_as_many_as_given() -> None:
    parser = ArgumentParser()
    add_data(parser, "labels")
    parsed = parser.parse_args(["--data", "a", "b", "--rename", "x=weak"])
    assert ([path.name for path in parsed.data], parsed.rename) == (["a", "b"], ["x=weak"])


def test_verbs_can_be_listed_without_what_they_need_to_run() -> None:
    verbs = "stitch_training.cli"
    heavy = "{'numpy', 'scipy', 'sklearn', 'matplotlib', 'grpc', 'safetensors'}"
    code = f"import sys, {verbs}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
