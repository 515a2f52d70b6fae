"""The installed package contains every file that the programs need."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("stitch", "stitch_server", "router_gateway", "stitch_training")


def test_every_data_file_is_packaged() -> None:
    forgotten = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.*")
        if path.suffix not in {".py", ".pyc"} and path.is_file() and path not in _packaged(package)
    ]
    assert forgotten == []


def test_every_folder_of_modules_is_a_package() -> None:
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert {str(path) for path in modules if not (path.parent / "__init__.py").is_file()} == set()


def test_every_console_script_loads() -> None:
    for name in PROJECT["project"]["scripts"]:
        (entry,) = metadata.entry_points(group="console_scripts", name=name)
        assert callable(entry.load())


def test_changelog_has_an_unreleased_section() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_check_and_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make check test" in script.read_text()


def test_hashes_are_of_every_locked_package_but_torch() -> None:
    locked = {line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("torch==")}
    entries = re.sub(r"\\\n\s+", "", (ROOT / "requirements.sha256").read_text()).splitlines()
    hashed = {re.split(r"[ ;]", entry)[0]: re.findall(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries}
    assert {_canonical(one) for one in hashed} == {_canonical(one) for one in locked}
    assert all(hashed.values())


def _canonical(requirement: str) -> str:
    return requirement.lower().replace("_", "-")


def _packaged(package: str) -> set[Path]:
    """The files that the patterns of `package-data` take from a package and those below it."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    everywhere = {path for pattern in patterns["*"] for path in (ROOT / package).rglob(pattern)}
    return everywhere | {path for pattern in patterns.get(package, ()) for path in (ROOT / package).glob(pattern)}
