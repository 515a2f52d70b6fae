"""Imports in fresh processes: clients load no model library, and `--help` loads almost nothing."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import stitch

ROOT = Path(__file__).parents[3]


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh Python has loaded after this statement."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}


def modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(stitch.__path__, "stitch.")]


def test_no_module_loads_model_library() -> None:
    assert "stitch.cli.demo" in modules()
    loaded = loaded_by(f"import {', '.join(modules())}")
    assert {"grpc", "rich"} <= loaded
    assert not loaded & {
        "torch",
        "matplotlib",
        "transformers",
        "gguf",
        "safetensors",
        "tokenizers",
        "stitch_server",
        "router_gateway",
    }


@pytest.mark.parametrize(
    "module",
    ["stitch.client", "stitch.cluster", "stitch.local.cluster", "stitch.cli.output"],
)
def test_client_and_output_load_no_drawing_library(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"rich", "matplotlib", "numpy"}


def test_client_loads_no_server_library() -> None:
    assert not loaded_by("import stitch.client") & {"prometheus_client", "jinja2", "numpy"}


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["up", "--help"]])
def test_help_loads_no_library(arguments: list[str]) -> None:
    call = (
        f"from stitch.cli.main import parser\ntry: parser().parse_args({arguments})\nexcept SystemExit: pass\nprint()"
    )
    loaded = loaded_by(f"exec({call!r})")
    assert "argparse" in loaded
    assert not loaded & {"grpc", "google", "pydantic", "rich", "matplotlib", "numpy", "asyncio"}
