"""Tests of the command line: instant help, errors in one sentence, exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest

from router_gateway.cli import main

HEAVY = ("grpc", "tokenizers", "pydantic", "prometheus_client", "jinja2", "torch")


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, router_gateway.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gateway_imports_no_torch() -> None:
    code = (
        "import sys, router_gateway.server; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "gone.toml"], "router-gateway: cluster is 'gone.toml', but it is no file and none of the presets"),
        (
            ["run", "smollm2"],
            "router-gateway: shards.bottom-0.address is '127.0.0.1:0', but it needs a host and a port",
        ),
        (["run", "smollm2", "--listen", "0.0.0.0:1"], "router-gateway: listen is '0.0.0.0:1', but other machines"),
    ],
)
def test_invalid_argument_ends_with_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
