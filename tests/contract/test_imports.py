"""Import contracts, deferred imports, and the extra that provides each dependency."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from stitch_server import cpu

ROOT = Path(__file__).parents[2]
PACKAGES = ("stitch", "stitch_server", "router_gateway", "stitch_training")
EXTRAS = {
    # `stitch.process` is for both programs.
    "stitch": ("cli", "gateway", "otel"),
    "stitch_server": ("shard",),
    "router_gateway": ("gateway",),
    # Training loads a shard's models and writes what a gateway's router reads.
    "stitch_training": ("shard", "gateway", "training"),
}
HEAVY = {"torch", "transformers", "gguf"}
TRAINING = {"sklearn", "scipy", "matplotlib"}
SERVING = {
    "numpy",
    "rich",
    "tokenizers",
    "jinja2",
    "safetensors",
    "prometheus_client",
    "grpc_health",
    "grpc_reflection",
}
# Imports a module and all below it in a process where the named packages cannot be imported.
IMPORT_WITHOUT = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2:]:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
root = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(root, "__path__", ()), f"{sys.argv[1]}."):
    importlib.import_module(module.name)
"""


def test_import_contracts_hold() -> None:
    lint = Path(sysconfig.get_path("scripts"), "lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("stitch", HEAVY),
        ("router_gateway", HEAVY),
        ("router_gateway.server", HEAVY | TRAINING),
        ("stitch.client", HEAVY | TRAINING | SERVING),
    ],
)
def test_module_imports_without_absent_packages(module: str, absent: set[str]) -> None:
    python = [sys.executable, "-W", "error", "-c", IMPORT_WITHOUT, module, *absent]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_a_declared_dependency(package: str) -> None:
    available = set(PACKAGES) | sys.stdlib_module_names | _provided_by(EXTRAS[package])
    undeclared = {
        name for name in _imported(package) if name.partition(".")[0] not in available and name not in available
    }
    assert undeclared == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_no_import_cycle(package: str) -> None:
    """Imports inside functions and for type checkers count as well."""
    imports = _imports_within(package)
    # Every module of a cycle imports another one of it, so removing modules without imports leaves the cycles.
    while leaves := {name for name, targets in imports.items() if not targets}:
        imports = {name: targets - leaves for name, targets in imports.items() if name not in leaves}
    # And every module of a cycle is imported by another one of it.
    while roots := imports.keys() - {target for targets in imports.values() for target in targets}:
        imports = {name: targets for name, targets in imports.items() if name not in roots}
    assert imports == {}


@pytest.mark.parametrize("program", ["stitch_server", "router_gateway", "stitch_training"])
def test_help_imports_no_heavy_package(program: str) -> None:
    code = (
        f"import sys; sys.argv = ['program', '--help']; from {program}.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numba', 'llvmlite', 'transformers'} & sys.modules.keys(), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_shard_imports_neither_models_nor_compilers() -> None:
    """They take longer than all else; native layers need none, and kernels are loaded with the layers."""
    absent = {"transformers", "torch._dynamo", "sympy", "numba", "llvmlite", "huggingface_hub", "gguf", "starlette"}
    code = f"import stitch_server.server, sys; found = {absent} & sys.modules.keys(); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_gateway_imports_no_torch() -> None:
    code = "import router_gateway.server, sys; assert not {'torch', 'numba', 'llvmlite'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["stitch_server.cpu", "stitch_server.model.weights"])
def test_kernels_are_loaded_on_first_use(module: str) -> None:
    code = f"import {module}, sys; assert not {{'numba', 'llvmlite'}} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_the_kernels_exists() -> None:
    assert [name for name in cpu.__all__ if not hasattr(cpu, name)] == []


def test_lock_file_pins_every_dependency() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(line.count("==") == 1 and not line.startswith("-") for line in lock)
    pinned = {_normal(line.partition("==")[0]) for line in lock}
    wanted = {name for extra in ("cli", "gateway", "shard", "training", "dev") for name in _distributions((extra,))}
    assert wanted - {"stitch-serving"} <= pinned


def _imported(folder: str) -> Iterator[str]:
    """Absolute names that any module of the folder imports: two parts for a `google` namespace, else one."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            yield from (".".join(name.split(".")[: 2 if name.startswith("google.") else 1]) for name in names)


def _imports_within(package: str) -> dict[str, set[str]]:
    """Every module of the package, and the other ones that it imports."""
    paths = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {name if (name := f"{node.module}.{a.name}") in paths else node.module for a in node.names}
        imports[module] = (names & paths.keys()) - {module}
    return imports


def _provided_by(extras: tuple[str, ...]) -> set[str]:
    """Import names of the distributions of these extras and of the base dependencies."""
    wanted = _distributions(extras)
    tops = {name for name, owners in metadata.packages_distributions().items() if wanted & set(map(_normal, owners))}
    return (tops - {"google"}) | {"google.protobuf", "google.rpc"}


def _distributions(extras: tuple[str, ...]) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(one for extra in extras for one in project["optional-dependencies"][extra]),
    ]
    return {_normal(requirement) for requirement in requirements}


def _normal(requirement: str) -> str:
    """The distribution's normalized name in a requirement."""
    name = requirement
    for end in "[<>=!~; ":
        name = name.partition(end)[0]
    return name.lower().replace("_", "-").replace(".", "-")
