"""CUDA graphs of decode steps: a pass of single tokens is captured once, and then replayed by one call.

Launching the kernels of a layer one by one takes a CPU longer than a GPU needs to compute them for a few tokens. A
graph reads the same memory in every replay, so a batch is copied into static buffers and padded to one of a few batch
sizes. A replay returns what `DecoderLayers.run` would.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stitch_server.attention import Rotary
from stitch_server.attention.flash import FlashAttention, FlashMetadata, VarlenKernel, pack_metadata
from stitch_server.devices import to_device_async
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers

# Larger batches are not captured: their kernels take longer than their launches.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Passes before the captured one, in which libraries choose kernels and allocate workspaces.
WARM_UP_PASSES = 2

# Computes again over the same memory, and overwrites its previous result.
Replay = Callable[[], Tensor]


class Capture(Protocol):
    """Captures a function that reads and writes the same memory in every call."""

    def __call__(self, compute: Callable[[], Tensor]) -> Replay: ...


def capture_for(device: torch.device) -> Capture | None:
    """The device's capture; None if it has none."""
    return CudaCapture(device) if device.type == "cuda" else None


class CudaCapture:
    """Captures CUDA graphs, as https://docs.pytorch.org/docs/stable/notes/cuda.html describes.

    All graphs share one memory pool: they run one after the other, and a result is copied before the next graph runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_PASSES):
                    compute()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU during the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class _StaticBuffers:
    """The input of a graph: hidden states, rotations, and metadata as `pack_metadata` makes it."""

    hidden: Tensor
    rotary: Rotary
    metadata: Tensor

    @classmethod
    def like(cls, tokens: int, hidden: Tensor, rotary: Rotary, metadata: Tensor) -> _StaticBuffers:
        """Buffers for `tokens` tokens of the given shapes and dtypes."""
        angles = tuple(tensor.new_zeros(tokens, *tensor.shape[1:]) for tensor in rotary)
        static = torch.empty_like(metadata, device=hidden.device)
        return cls(hidden.new_zeros(tokens, *hidden.shape[1:]), angles, static)

    def fill(self, hidden: Tensor, rotary: Rotary, metadata: Tensor) -> None:
        """Copies a batch into the leading rows. The others keep their values: their results are never read."""
        for static, given in zip((self.hidden, *self.rotary), (hidden, *rotary), strict=True):
            static[: len(given)] = given
        self.metadata.copy_(to_device_async(metadata, hidden.device))


class DecodeGraphs:
    """The graphs of one shard: one for each batch size, layer range and adapters."""

    def __init__(
        self,
        decoder: DecoderLayers,
        store: KVStore,
        kernel: VarlenKernel,
        max_blocks: int,
        capture: Capture,
        batch_sizes: Sequenced[int] = BATCH_SIZES,
    ) -> None:
        """Sequences of more than `max_blocks` blocks are not captured; padding writes to the last block of `store`."""
        self._decoder, self._store, self._kernel = decoder, store, kernel
        self._max_blocks, self._capture, self._batch_sizes = max_blocks, capture, batch_sizes
        # By batch size, first and last layer, and the identity of the adapters.
        self._graphs: dict[tuple[int, int, int, int], tuple[_StaticBuffers, Replay]] = {}

    def run(
        self,
        spans: Sequenced[Span],
        hidden: Tensor,
        rotary: Rotary,
        first: int,
        end: int,
        adapted: Sequenced[tuple[slice, Adapters]],
    ) -> Tensor | None:
        """What `DecoderLayers.run` returns for these spans; None for a batch that isn't captured."""
        size = next((size for size in self._batch_sizes if size >= len(spans)), None)
        if size is None or not self._is_capturable(spans, adapted):
            return None
        adapters = adapted[0][1] if adapted else None
        padding = [Span(0, 1, [self._store.blocks - 1])] * (size - len(spans))
        metadata = pack_metadata([*spans, *padding], self._store.block_tokens, self._max_blocks)
        key = size, first, end, id(adapters)
        graph = self._graphs.get(key)
        buffers = graph[0] if graph else _StaticBuffers.like(size, hidden, rotary, metadata)
        buffers.fill(hidden, rotary, metadata)
        if graph is None:
            # Capturing computes the batch already, several times: each time the same values into the same slots.
            graph = buffers, self._capture(self._compute_over(size, buffers, first, end, adapters))
            self._graphs[key] = graph
        return graph[1]()[: len(spans)].clone()

    def _is_capturable(self, spans: Sequenced[Span], adapted: Sequenced[tuple[slice, Adapters]]) -> bool:
        """Whether all spans are single tokens that pass the same adapters, or none."""
        uniform = not adapted or [rows for rows, _ in adapted] == [slice(0, len(spans))]
        return uniform and all(span.length == 1 and span.end <= self._max_tokens for span in spans)

    def _compute_over(
        self, size: int, buffers: _StaticBuffers, first: int, end: int, adapters: Adapters | None
    ) -> Callable[[], Tensor]:
        adapted = [] if adapters is None else [(slice(0, size), adapters)]

        def compute() -> Tensor:
            # A capture freezes integers of the host, so the KV length's upper bound is the largest possible.
            metadata = FlashMetadata.unpack(buffers.metadata, size, size, 1, self._max_tokens)
            attention = FlashAttention(self._store, self._kernel, [1] * size, metadata)
            return self._decoder.run(buffers.hidden, buffers.rotary, attention, first, end, adapted)

        return compute

    @property
    def _max_tokens(self) -> int:
        return self._max_blocks * self._store.block_tokens
