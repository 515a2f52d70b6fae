"""A replayed graph gives what the same layers give eagerly, and each kind of pass is captured once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stitch_server.attention import backend_for
from stitch_server.attention.flash import PAGE_TOKENS
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.worker.cuda_graphs import DecodeGraphs, capture_for
from tests.support.cpu_capture import CpuCapture, HostSynchronized
from tests.support.reference_varlen_kernel import reference_varlen
from tests.support.tiny_model import write_tiny_model

CPU = torch.device("cpu")
LAYERS, WIDTH = 3, 32
SEQUENCES, PAGES_EACH = 9, 2
SPARE = SEQUENCES * PAGES_EACH
BLOCKS = SPARE + 1
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 270},
}


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DecoderLayers:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param, layers=LAYERS, hidden_size=WIDTH, **FAMILIES[request.param])
    return DecoderLayers.load(folder, 0, LAYERS, CPU, torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DecoderLayers:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), layers=LAYERS, hidden_size=WIDTH)
    return DecoderLayers.load(folder, 0, LAYERS, CPU, torch.float32)


class GraphsAndEager:
    """Sequences whose next tokens pass captured layers, and the same layers eagerly over a second store."""

    def __init__(self, decoder: DecoderLayers, batch_sizes: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        shape = 0, LAYERS, BLOCKS, decoder.kv_heads, decoder.head_dim, CPU, torch.float32, PAGE_TOKENS
        self.decoder, self.cpu_capture = decoder, CpuCapture()
        self.store, self.eager_store = KVStore(*shape), KVStore(*shape)
        self.captured, self.eager = backend_for(self.store, reference_varlen), backend_for(self.eager_store)
        self.graphs = DecodeGraphs(decoder, self.store, reference_varlen, PAGES_EACH, self.cpu_capture, batch_sizes)
        self.ends = [0] * SEQUENCES
        self.draw = torch.Generator().manual_seed(0)

    def spans(self, sequences: list[int], length: int = 1) -> list[Span]:
        # The blocks of the sequences interleave.
        return [Span(self.ends[one], length, [SPARE - 1 - one, one]) for one in sequences]

    def given(self, spans: list[Span]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states and rotations."""
        positions = torch.cat([torch.arange(span.position, span.end) for span in spans])
        return torch.randn(len(positions), WIDTH, generator=self.draw), self.decoder.rotary(positions)

    def prefill(self, *lengths: int) -> None:
        """Prompts of these lengths for the first sequences, in both stores."""
        for one, length in enumerate(lengths):
            spans = self.spans([one], length)
            hidden, rotary = self.given(spans)
            for backend in (self.captured, self.eager):
                self.decoder.run(hidden, rotary, backend(spans), 0, LAYERS)
            self.ends[one] = length

    def step(self, sequences: list[int], first: int = 0, end: int = LAYERS, adapters: Adapters | None = None) -> Tensor:
        """The next token of each sequence: the result of the graph, once it is compared with the eager one."""
        spans = self.spans(sequences)
        hidden, rotary = self.given(spans)
        adapted = [] if adapters is None else [(slice(0, len(sequences)), adapters)]
        got = self.graphs.run(spans, hidden, rotary, first, end, adapted)
        assert got is not None
        expected = self.decoder.run(hidden, rotary, self.eager(spans), first, end, adapted)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for one in sequences:
            self.ends[one] += 1
        return got


def adapters(seed: int) -> Adapters:
    draw = torch.Generator().manual_seed(seed)
    return Adapters(0, torch.randn(LAYERS, 2, WIDTH, generator=draw), torch.randn(LAYERS, WIDTH, 2, generator=draw))


def test_replays_equal_the_eager_pass_for_every_family(decoder: DecoderLayers) -> None:
    """Across the end of a block, in another order each time, with and without padding."""
    bench = GraphsAndEager(decoder)
    bench.prefill(PAGE_TOKENS - 2, 5, 300)
    for sequences in ([0], [0, 1], [1, 0], [2, 0, 1], [0, 1, 2, 3], [3], [3, 2, 1, 0]):
        bench.step(sequences)


@pytest.mark.parametrize("rows", range(1, 9))
def test_batch_is_padded_to_the_next_batch_size(llama: DecoderLayers, rows: int) -> None:
    bench = GraphsAndEager(llama)
    bench.prefill(*range(1, rows + 1))
    for _ in range(3):
        bench.step(list(range(rows)))
    assert (bench.cpu_capture.captured, bench.cpu_capture.replayed) == (1, 3)


def test_each_batch_size_is_captured_once(llama: DecoderLayers) -> None:
    bench = GraphsAndEager(llama)
    captured = []
    for rows in (1, 2, 3, 4, 5, 8, 7, 3, 1, 2):
        bench.step(list(range(rows)))
        captured.append(bench.cpu_capture.captured)
    assert captured == [1, 2, 3, 3, 4, 4, 4, 4, 4, 4]


def test_each_layer_range_is_captured_once(llama: DecoderLayers) -> None:
    bench = GraphsAndEager(llama)
    for _ in range(2):
        for first, end in ((0, 2), (2, 3)):
            bench.step([0, 1], first, end)
            bench.ends = [0] * SEQUENCES
    assert (bench.cpu_capture.captured, bench.cpu_capture.replayed) == (2, 4)
    # The same operators for each layer, beside those that unpack the batch.
    longer, shorter = bench.cpu_capture.lengths
    assert shorter < longer < 2 * shorter


def test_each_adapter_is_captured_once(llama: DecoderLayers) -> None:
    bench, kinds = GraphsAndEager(llama), (adapters(1), None, adapters(2))
    for _ in range(2):
        results = [bench.step([0, 1, 2], adapters=kind) for kind in kinds]
    assert (bench.cpu_capture.captured, bench.cpu_capture.replayed) == (3, 6)
    assert not any(torch.allclose(results[one], results[other]) for one, other in ((0, 1), (1, 2), (0, 2)))


def test_result_is_unchanged_by_the_next_replay(llama: DecoderLayers) -> None:
    bench = GraphsAndEager(llama)
    kept = bench.step([0, 1])
    before = kept.clone()
    bench.step([1, 0])
    assert torch.equal(kept, before)


def test_padding_writes_only_to_the_spare_block(llama: DecoderLayers) -> None:
    bench = GraphsAndEager(llama)
    bench.store.kv.fill_(7.0)
    bench.prefill(3, 4, 5)
    before = bench.store.kv.clone()
    bench.step([0, 1, 2])
    changed = (bench.store.kv != before).any(dim=(0, 2, 3))
    assert {int(slot) for slot in changed.nonzero()} == {
        *((SPARE - 1 - one) * PAGE_TOKENS + 3 + one for one in range(3)),
        SPARE * PAGE_TOKENS,
    }


class TestEagerBatches:
    """Batches that are not captured."""

    def is_eager(self, bench: GraphsAndEager, spans: list[Span], adapted: list[tuple[slice, Adapters]]) -> bool:
        hidden, rotary = bench.given(spans)
        return bench.graphs.run(spans, hidden, rotary, 0, LAYERS, adapted) is None

    def test_batch_above_the_largest_size_is_not_captured(self, llama: DecoderLayers) -> None:
        bench = GraphsAndEager(llama)
        assert self.is_eager(bench, bench.spans(list(range(9))), [])

    def test_batch_with_a_prefill_chunk_is_not_captured(self, llama: DecoderLayers) -> None:
        bench = GraphsAndEager(llama)
        assert self.is_eager(bench, [*bench.spans([0]), *bench.spans([1], 2)], [])

    def test_sequence_above_the_maximum_blocks_is_not_captured(self, llama: DecoderLayers) -> None:
        bench = GraphsAndEager(llama)
        bench.ends[0] = PAGES_EACH * PAGE_TOKENS
        assert self.is_eager(bench, bench.spans([0, 1]), [])

    @pytest.mark.parametrize("rows", [[slice(0, 1)], [slice(1, 2)], [slice(0, 1), slice(1, 2)]])
    def test_batch_of_different_adapters_is_not_captured(self, llama: DecoderLayers, rows: list[slice]) -> None:
        bench = GraphsAndEager(llama)
        assert self.is_eager(bench, bench.spans([0, 1]), [(one, adapters(index)) for index, one in enumerate(rows)])
        assert bench.cpu_capture.captured == 0


class TestTape:
    """The stand-in for CUDA graphs on a CPU refuses what a graph can't hold."""

    @pytest.mark.parametrize(
        "asking",
        [
            lambda rows: rows * float(rows.sum()),
            lambda rows: rows if bool((rows > 0).all()) else -rows,
            lambda rows: rows[[0, 1]],
            lambda rows: rows[rows > 0],
            lambda rows: rows + torch.tensor([1.0, 2.0, 3.0]),
        ],
    )
    def test_capture_refuses_host_synchronization(self, asking: object) -> None:
        rows = torch.ones(3)
        with pytest.raises(HostSynchronized):
            CpuCapture()(lambda: asking(rows))  # type: ignore[operator]

    def test_replay_reads_tensors_and_not_host_values(self) -> None:
        rows, factor = torch.ones(3), [2.0]
        replay = CpuCapture()(lambda: (rows * factor[0]).add_(1).view(3, 1))
        rows.fill_(5)
        factor[0] = 100.0
        assert replay().flatten().tolist() == [11.0, 11.0, 11.0]


def test_cpu_has_no_capture() -> None:
    assert capture_for(CPU) is None
