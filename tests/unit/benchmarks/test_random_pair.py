"""The random pair of `bench_gpu` generates tokens and reads the stated number of bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.random_pair import DTYPE, QWEN, ROUTE, TINY, bytes_per_token, write_pair
from tests.support.in_process import ChainInProcess

pytestmark = pytest.mark.slow


def test_bytes_per_token_match_shards_parameters(tmp_path: Path) -> None:
    chain = ChainInProcess(write_pair(tmp_path, TINY, "cpu"))
    parameters = sum(route.parameters for shard in chain.shards.values() for route in shard.identity.routes)
    assert bytes_per_token(tmp_path, TINY) == parameters * DTYPE.itemsize


def test_random_pair_generates_tokens(tmp_path: Path) -> None:
    chain = ChainInProcess(write_pair(tmp_path, TINY, "cpu"))
    answer = chain.generate(range(1000, 1020), ROUTE, ("top-0",), 3)
    assert len(answer) == 3
    assert all(0 <= token < TINY.top.tokens for token in answer)


def test_layer_has_size_of_qwen_layer(tmp_path: Path) -> None:
    """Qwen2.5 1.5B has 1.31 billion parameters in its 28 layers."""
    narrow = replace(QWEN.top, tokens=100)
    shapes = replace(QWEN, bottom=narrow, top=narrow, bottom_layers=1, top_from=27)
    write_pair(tmp_path, shapes, "cpu")
    layers = bytes_per_token(tmp_path, shapes) - DTYPE.itemsize * (1536 * (1536 + 1) + 101 * 1536)
    assert round(layers / DTYPE.itemsize / 2 * 28 / 1e9, 2) == 1.31
