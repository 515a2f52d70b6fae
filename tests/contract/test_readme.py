"""The commands, settings, files and links in README, docs and benchmarks exist, and the commands parse."""

from __future__ import annotations

import argparse
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import router_gateway.cli
import stitch.cli.main
import stitch_server.cli
import stitch_training.cli
from router_gateway.admission.tenants import Tenant
from stitch.cluster import BatchingConfig, ComputeConfig, GatewayConfig, PairConfig, RouteConfig, ShardConfig
from stitch.settings import Settings
from stitch.tls import TlsFiles
from tests.support.fake_gateway import FakeGateway, serving

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
SOURCES = ("protos", "stitch", "router_gateway", "stitch_server", "stitch_training")
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "stitch": stitch.cli.main.parser,
    "stitch-server": stitch_server.cli.build_parser,
    "router-gateway": router_gateway.cli.build_parser,
    "stitch-train": stitch_training.cli.build_parser,
}
SECTIONS: dict[str, type[Settings]] = {
    "models": PairConfig,
    "compute": ComputeConfig,
    "batching": BatchingConfig,
    "gateway": GatewayConfig,
    "tls": TlsFiles,
}


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for words in _commands(page, "make") for word in words[1:] if re.fullmatch("[a-z-]+", word)}
    assert named <= targets


@pytest.mark.parametrize("program", PARSERS)
def test_command_lines_parse(page: Path, program: str) -> None:
    for words in _commands(page, program):
        PARSERS[program]().parse_args(words[1:])


def test_links_point_to_existing_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_readme_shows_make_demo_and_make_test() -> None:
    shown = {tuple(words[:2]) for words in _commands(ROOT / "README.md", "make")}
    assert {("make", "demo"), ("make", "test")} <= shown


def test_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_settings_in_the_configuration_page_exist() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    sections = tomllib.loads("\n".join(re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)))
    for fields in sections.pop("tenants").values():
        assert set(fields) <= set(Tenant.model_fields)
    for fields in sections.pop("shards"):
        assert ShardConfig.model_validate(fields)
    for fields in sections.pop("routes"):
        assert RouteConfig.model_validate(fields)
    assert set(sections) == set(SECTIONS)
    for name, fields in sections.items():
        assert set(fields) <= set(SECTIONS[name].model_fields)


def test_architecture_has_at_most_150_lines_of_120_characters() -> None:
    lines = (ROOT / "docs/architecture.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_files_named_in_the_architecture_exist() -> None:
    named = set(re.findall(r"`([a-z_/]+\.(?:py|proto))`", (ROOT / "docs/architecture.md").read_text()))
    files = [f"/{path.relative_to(ROOT)}" for folder in SOURCES for path in (ROOT / folder).rglob("*.*")]
    assert named
    assert {name for name in named if not any(file.endswith(f"/{name}") for file in files)} == set()


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    with serving(FakeGateway()) as gateway:
        exec(example.replace("127.0.0.1:7000", gateway.address), {})
    assert capsys.readouterr().out.startswith("echo: The capital of France is")


def _commands(page: Path, program: str) -> list[list[str]]:
    """Every line of a shell block that runs the program, as words."""
    blocks = re.findall(r"^```(?:sh|shell|bash|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [one for one in words if one and one[0].rpartition("/")[2] == program]
