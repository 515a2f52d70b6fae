"""`stitch keys new`, and where the verbs of clients read a key."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest

from router_gateway.admission.tenants import hash_key
from stitch.cli.arguments import gateway_key
from stitch.cli.main import main
from stitch.client.messages import key_metadata
from stitch.errors import InvalidRequest


def test_printed_section_accepts_the_printed_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "blue"]) == 0
    printed = capsys.readouterr().out
    [key] = [line[2:] for line in printed.splitlines() if line.startswith("# stitch-")]
    assert tomllib.loads(printed) == {"tenants": {"blue": {"keys": [hash_key(key)]}}}
    assert key_metadata(key) == (("authorization", f"Bearer {key}"),)


@pytest.mark.parametrize("name", ["Blue", "a b", "", "a.b"])
def test_name_that_a_keys_file_refuses_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "new", name])
    assert "characters" in capsys.readouterr().err


def test_key_is_read_from_the_file_else_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("STITCH_KEY", "from-environment")
    assert gateway_key(argparse.Namespace(key=file)) == "from-file"
    assert gateway_key(argparse.Namespace(key=None)) == "from-environment"
    monkeypatch.delenv("STITCH_KEY")
    assert gateway_key(argparse.Namespace(key=None)) is None
    with pytest.raises(InvalidRequest, match="--key"):
        gateway_key(argparse.Namespace(key=tmp_path / "none"))


@pytest.mark.parametrize("key", ["", "two words", "é", "line\nbreak"])
def test_key_that_cannot_be_sent_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        key_metadata(key)
    assert str(caught.value) == "key is 'not shown', but it must be printable ASCII without spaces"
