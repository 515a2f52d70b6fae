"""Clusters of real processes, and programs that stand in for them. Knows no test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_programs import installed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m stitch_server.cli` and `python -m router_gateway.cli` are stand-ins; the cache is the test's own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(installed(tmp_path / "programs"))
