"""The command line: instant help, and sentences for what is wrong before anything heavy is loaded."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from stitch.errors import Incompatible
from stitch_server import cli
from stitch_server.cli import build_parser, main
from stitch_server.sources import Progress, resolve

HEAVY = ("torch", "transformers", "safetensors", "prometheus_client", "pydantic", "gguf", "numpy")


def test_help_imports_no_heavy_module() -> None:
    code = (
        f"import sys, stitch_server.cli; stitch_server.cli.build_parser().format_help();"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_verb() -> None:
    help_text = build_parser().format_help()
    for verb in ("run", "import", "plan"):
        assert f"\n    {verb} " in help_text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "gone.toml", "--shard", "top-0"], "stitch-server: cluster is 'gone.toml', but it is no file and none"),
        (["run", "smollm2", "--shard", "x"], "stitch-server: shard is 'x', but the cluster file has: bottom-0, top-0"),
        (
            ["run", "smollm2", "--shard", "top-0", "--listen", "0.0.0.0:1"],
            "stitch-server: listen is '0.0.0.0:1', but other machines reach it without TLS: the cluster file",
        ),
        (["run", "smollm2", "--shard", "top-0", "--drain-seconds", "-1"], "stitch-server: drain_seconds is -1.0, but"),
        (["plan", "gone.toml"], "stitch-server: cluster is 'gone.toml', but it is no file and none of the presets"),
    ],
)
def test_invalid_request_prints_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "smollm2"], ["dance"]])
def test_missing_argument_prints_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: stitch-server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(Incompatible("two sides"), 2), (OSError("port 7 is taken"), 1)], ids=["refused", "taken"]
)
def test_error_has_its_exit_status(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(parsed: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["run", "smollm2", "--shard", "top-0"]) == status
    assert capsys.readouterr().err == f"stitch-server: {error}\n"


@pytest.mark.parametrize(("flags", "out"), [([], None), (["--out", "there"], Path("there"))])
def test_import_prints_the_folder_and_progress(
    flags: list[str], out: Path | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imports: list[tuple[str, Path | None]] = []

    def import_model(source: str, folder: Path | None, progress: Progress) -> Path:
        imports.append((source, folder))
        progress("importing", 1.0)
        return Path("models/it")

    monkeypatch.setattr(resolve, "import_model", import_model)
    assert main(["import", "some/model", *flags]) == 0
    assert imports == [("some/model", out)]
    printed = capsys.readouterr()
    assert printed.out == "models/it\n"
    assert printed.err == "importing: 100 of 100\n"
