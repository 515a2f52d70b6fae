"""A few tokens pass all layers of a shard in one call, and many do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stitch.cluster import load_cluster
from stitch_server.model import stack
from tests.support.in_process import ChainInProcess
from tests.support.tiny_cluster import write_tiny_cluster


@pytest.mark.parametrize("row_copies", [True, False])
def test_few_tokens_are_one_call_and_a_long_prompt_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_copies: bool
) -> None:
    cluster = load_cluster(str(write_tiny_cluster(tmp_path, threads=1, row_copies=row_copies)))
    chain, layers, run = ChainInProcess(cluster), [], stack.run

    def noting(*arguments: Any) -> None:
        layers.append(arguments[3:5])
        run(*arguments)

    monkeypatch.setattr(stack, "run", noting)
    chain.generate([7, 8, 9], "strong", ("top-0",), 5)
    assert layers == ([(0, 4), (3, 4)] * 5 if row_copies else [])
    layers.clear()
    chain.generate([7] * 100, "strong", ("top-0",), 5)
    assert layers == ([(0, 4), (3, 4)] * 4 if row_copies else [])
