"""The pair that a GPU is measured with is a cluster like others, and reads as many bytes as is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.random_pair import DTYPE, QWEN, ROUTE, TINY, bytes_per_token, write_pair
from tests.support.in_process import ChainInProcess


def test_a_token_reads_what_the_shards_say(tmp_path: Path) -> None:
    chain = ChainInProcess(write_pair(tmp_path, TINY, "cpu"))
    said = sum(route.parameters for shard in chain.shards.values() for route in shard.identity.routes)
    assert bytes_per_token(tmp_path, TINY) == said * DTYPE.itemsize


def test_its_answers_are_tokens(tmp_path: Path) -> None:
    chain = ChainInProcess(write_pair(tmp_path, TINY, "cpu"))
    answer = chain.generate(range(1000, 1020), ROUTE, ("top-0",), 3)
    assert len(answer) == 3
    assert all(0 <= token < TINY.top.tokens for token in answer)


def test_a_layer_is_as_large_as_that_of_the_model(tmp_path: Path) -> None:
    """Qwen2.5 1.5B has 1.31 billion parameters in its 28 layers."""
    narrow = replace(QWEN.top, tokens=100)
    shapes = replace(QWEN, bottom=narrow, top=narrow, bottom_layers=1, top_from=27)
    write_pair(tmp_path, shapes, "cpu")
    layers = bytes_per_token(tmp_path, shapes) - DTYPE.itemsize * (1536 * (1536 + 1) + 101 * 1536)
    assert round(layers / DTYPE.itemsize / 2 * 28 / 1e9, 2) == 1.31
