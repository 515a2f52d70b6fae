"""A device gets blocks of its own size, a kernel where there is one, and captured passes where they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import ComputeConfig
from stitch_server import provision
from stitch_server.attention.flash import PAGE_TOKENS
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.span import Span
from stitch_server.model.decoder import DecoderLayers
from stitch_server.provision import Provision, provide
from tests.support.tape import Tape
from tests.support.tiny_model import write_tiny_model
from tests.support.varlen import varlen

CPU = torch.device("cpu")
CONTEXT, KV_TOKENS = 1000, 8192


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> DecoderLayers:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("model"))
    return DecoderLayers.load(folder, 1, 3, CPU, torch.float32)


def provided(decoder: DecoderLayers, **compute: Any) -> Provision:
    return provide(ComputeConfig(**{"kv_tokens": KV_TOKENS, **compute}), decoder, CONTEXT, CPU)


class TestProcessor:
    def test_it_has_small_blocks_and_nothing_else(self, decoder: DecoderLayers) -> None:
        given = provided(decoder)
        assert (given.pool.block_tokens, given.pool.tokens) == (BLOCK_TOKENS, KV_TOKENS)
        assert (given.store.blocks, given.store.kernel, given.graphs) == (given.pool.blocks, None, None)
        assert (given.store.first, given.store.end) == (1, 3)

    def test_its_blocks_may_be_those_of_a_gpu(self, decoder: DecoderLayers) -> None:
        given = provided(decoder, kv_block_tokens=PAGE_TOKENS)
        assert (given.pool.block_tokens, given.store.block_tokens) == (PAGE_TOKENS, PAGE_TOKENS)
        assert (given.pool.blocks, given.store.blocks, given.store.kernel) == (32, 32, None)


class TestGpu:
    @pytest.fixture(autouse=True)
    def queries(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        """What a kernel was asked for."""
        queries: list[tuple[Any, ...]] = []

        def kernel_for(*given: Any) -> object:
            queries.append(given)
            return varlen

        monkeypatch.setattr(provision, "kernel_for", kernel_for)
        monkeypatch.setattr(provision, "capture_for", lambda device: Tape())
        return queries

    def test_the_kernel_is_for_what_is_computed(self, decoder: DecoderLayers, queries: list[tuple[Any, ...]]) -> None:
        assert provided(decoder, dtype="bfloat16").store.kernel is varlen
        assert queries == [(CPU, torch.bfloat16, decoder.head_dim)]

    def test_its_pool_does_not_know_the_last_block(self, decoder: DecoderLayers) -> None:
        given = provided(decoder)
        assert (given.pool.block_tokens, given.pool.tokens) == (PAGE_TOKENS, KV_TOKENS)
        assert given.store.blocks == given.pool.blocks + 1
        given.pool.begin(1, [], 0)
        assert given.pool.grow(1, KV_TOKENS)
        assert given.store.blocks - 1 not in given.pool.blocks_of(1)

    @pytest.mark.parametrize(("kv_tokens", "longest"), [(KV_TOKENS, 1024), (600, 512)])
    def test_the_longest_sequence_is_captured(self, decoder: DecoderLayers, kv_tokens: int, longest: int) -> None:
        """As long as the context, or as there is room for."""
        graphs = provided(decoder, kv_tokens=kv_tokens).graphs
        assert graphs is not None
        for end, captured in ((longest, True), (longest + 1, False)):
            spans = [Span(end - 1, 1, [0, 1, 2, 3, 4])]
            hidden, rotary = torch.zeros(1, decoder.hidden_size), decoder.rotary(torch.tensor([end - 1]))
            assert (graphs.run(spans, hidden, rotary, 1, 3, []) is not None) == captured

    @pytest.mark.parametrize("compute", [{"captured_decode": False}, {"kv_block_tokens": BLOCK_TOKENS}])
    def test_a_file_may_ask_to_go_without(self, decoder: DecoderLayers, compute: dict[str, Any]) -> None:
        given = provided(decoder, **compute)
        assert given.graphs is None
        assert (given.store.kernel is None) == ("kv_block_tokens" in compute)
