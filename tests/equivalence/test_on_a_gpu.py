"""PyTorch's varlen kernel and CUDA graphs equal their references. Skipped on machines without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stitch_server.attention import backend_for
from stitch_server.attention.flash import PAGE_TOKENS, VarlenKernel, varlen_kernel_for
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model.decoder import DecoderLayers
from stitch_server.worker.cuda_graphs import DecodeGraphs, capture_for
from tests.support.reference_varlen_kernel import reference_varlen
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use")

CPU, GPU, DTYPE = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
HEADS, KV_HEADS, HEAD_DIM, PAGES = 6, 2, 64, 8
LAYERS, WIDTH = 3, 384
# The pages of two sequences, interleaved.
BLOCKS = [[5, 2, 0], [1, 6, 3]]
CLOSE = {"rtol": 0.03, "atol": 0.03}


def kernel() -> VarlenKernel:
    found = varlen_kernel_for(GPU, DTYPE, HEAD_DIM)
    assert found is not None, "this GPU has no kernel for attention over pages"
    return found


@pytest.mark.parametrize("window", [None, 7, 300])
def test_varlen_kernel_equals_the_reference(window: int | None) -> None:
    shape = 0, 1, PAGES, KV_HEADS, HEAD_DIM
    stores = [KVStore(*shape, GPU, DTYPE, PAGE_TOKENS), KVStore(*shape, CPU, DTYPE, PAGE_TOKENS)]
    backends = [backend_for(store, each) for store, each in zip(stores, (kernel(), reference_varlen), strict=True)]
    for store in stores:
        store.kv.fill_(float("nan"))
    batches = [[(0, 300), (0, 20)], [(300, 1), (20, 280)], [(301, 1), (300, 1)], [(302, 250), (301, 1)]]
    for batch in batches:
        spans = [Span(*where, blocks) for where, blocks in zip(batch, BLOCKS, strict=True)]
        rows = torch.randn(sum(span.length for span in spans), HEADS + 2 * KV_HEADS, HEAD_DIM).to(DTYPE)
        results = []
        for store, backend in zip(stores, backends, strict=True):
            query, key, value = rows.to(store.kv.device).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            results.append(backend(spans)(0, query, key, value, 0.125, window).cpu().float())
        torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("rows", [1, 2])
def test_replayed_graph_equals_the_eager_pass(rows: int, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", layers=LAYERS, hidden_size=WIDTH, heads=HEADS, kv_heads=KV_HEADS)
    decoder = DecoderLayers.load(folder, 0, LAYERS, GPU, DTYPE)
    stores = [KVStore(0, LAYERS, PAGES, KV_HEADS, HEAD_DIM, GPU, DTYPE, PAGE_TOKENS) for _ in range(2)]
    capture = capture_for(GPU)
    assert capture is not None
    graphs = DecodeGraphs(decoder, stores[0], kernel(), 3, capture)
    with torch.inference_mode():
        # Crosses a page boundary.
        for position in range(PAGE_TOKENS + 3):
            spans = [Span(position, 1, BLOCKS[row]) for row in range(rows)]
            hidden = torch.randn(rows, WIDTH, device=GPU).to(DTYPE)
            rotary = decoder.rotary(torch.full((rows,), position, device=GPU))
            replayed = graphs.run(spans, hidden, rotary, 0, LAYERS, [])
            assert isinstance(replayed, Tensor)
            expected = decoder.run(hidden, rotary, backend_for(stores[1], kernel())(spans), 0, LAYERS)
            torch.testing.assert_close(replayed, expected, **CLOSE)
