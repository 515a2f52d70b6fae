"""The command line: instant help, sentences for what is wrong, and signals that end it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from router_gateway.cli import main

HEAVY = ("grpc", "tokenizers", "pydantic", "prometheus_client", "jinja2", "torch")


def test_help_loads_nothing_heavy() -> None:
    code = f"import sys, router_gateway.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_gateway_needs_no_torch() -> None:
    code = (
        "import sys, router_gateway.server; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "gone.toml"], "router-gateway: cluster is 'gone.toml', but it is no file and none of the presets"),
        (["run", "smollm2"], "router-gateway: shards.bottom-0.address is '127.0.0.1:0', but it needs a port"),
        (["run", "smollm2", "--listen", "0.0.0.0:1"], "router-gateway: listen is '0.0.0.0:1', but other machines"),
    ],
)
def test_what_can_t_be_is_said_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
