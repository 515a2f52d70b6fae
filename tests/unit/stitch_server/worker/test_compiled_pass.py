"""A pass of compiled layers is one call; int8 without AMX runs layer by layer for many tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stitch.cluster import load_cluster
from stitch_server import cpu
from stitch_server.model import compiled_layers
from tests.support.in_process import ChainInProcess
from tests.support.tiny_cluster import write_tiny_cluster

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("fields", "tiles", "few", "many"),
    [
        ({}, False, 1, 1),
        ({"quantization": "int8"}, False, 1, 0),
        ({"quantization": "int8"}, True, 1, 1),
        ({"kernels": False}, False, 0, 0),
    ],
)
def test_compiled_pass_is_one_call_of_all_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], tiles: bool, few: int, many: int
) -> None:
    if tiles and not cpu.has_amx():
        pytest.skip("this CPU has no AMX")
    monkeypatch.setattr(cpu, "has_amx", lambda: tiles)
    cluster = load_cluster(str(write_tiny_cluster(tmp_path, threads=1, **fields)))
    chain, layers, run = ChainInProcess(cluster), [], compiled_layers.run_layers

    def record(*arguments: Any) -> None:
        layers.append(arguments[2:4])
        run(*arguments)

    monkeypatch.setattr(compiled_layers, "run_layers", record)
    chain.generate([7, 8, 9], "strong", ("top-0",), 5)
    assert layers == [(0, 4), (3, 4)] * 5 * few
    layers.clear()
    chain.generate([7] * 100, "strong", ("top-0",), 5)
    assert layers == [(0, 4), (3, 4)] * (many + 4 * few)
