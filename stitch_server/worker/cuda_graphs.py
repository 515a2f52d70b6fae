"""Steps of single tokens, captured once and then replayed: a GPU gets all kernels of all layers by one call.

Launched one by one, the kernels of a layer take a processor longer than a GPU needs to compute them for a few rows.
A captured pass runs over the same memory each time and with the same sizes, so what it reads is copied into buffers,
and batches are filled up to a few sizes. Knows no session, no stitch and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stitch_server.attention.flash import FlashAttention, Kernel, Places, packed_places
from stitch_server.attention.interface import Rotary
from stitch_server.devices import to_device_async
from stitch_server.kv_cache.span import Span
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers

# Rows of a captured pass; larger batches are not captured, since there the kernels take longer than their launches.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# Passes before the captured one, in which libraries choose kernels and take memory.
WARM_UPS = 2

# Computes anew over the same memory; each call overwrites the result of the one before.
Replay = Callable[[], Tensor]


class Capture(Protocol):
    """What makes a replay of a function that reads and writes the same memory whenever it is called."""

    def __call__(self, compute: Callable[[], Tensor]) -> Replay: ...


def capture_for(device: torch.device) -> Capture | None:
    """What captures on the device; None where nothing does."""
    return CudaCapture(device) if device.type == "cuda" else None


class CudaCapture:
    """By CUDA graphs, as https://docs.pytorch.org/docs/stable/notes/cuda.html says; all share one pool of memory.

    They may, since they run one after the other and what one leaves is copied before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    compute()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What a captured pass reads: hidden states, rotations, and places as `packed_places` makes them."""

    hidden: Tensor
    rotary: Rotary
    places: Tensor

    @classmethod
    def of(cls, rows: int, hidden: Tensor, rotary: Rotary, places: Tensor) -> _Buffers:
        """For so many rows like the given ones."""
        angles = tuple(part.new_zeros(rows, *part.shape[1:]) for part in rotary)
        return cls(hidden.new_zeros(rows, *hidden.shape[1:]), angles, torch.empty_like(places, device=hidden.device))

    def fill(self, hidden: Tensor, rotary: Rotary, places: Tensor) -> None:
        """Rows behind the given ones stay as they are: nobody reads what becomes of them."""
        for kept, given in zip((self.hidden, *self.rotary), (hidden, *rotary), strict=True):
            kept[: len(given)] = given
        self.places.copy_(to_device_async(places, hidden.device))


class DecodeGraphs:
    """The captured passes of one shard: one for each number of rows, range of layers and adapters."""

    def __init__(
        self,
        decoder: DecoderLayers,
        store: KVStore,
        kernel: Kernel,
        most_blocks: int,
        capture: Capture,
        buckets: Sequenced[int] = BUCKETS,
    ) -> None:
        """No sequence that is captured has more than `most_blocks` blocks; the last block of `store` is nobody's."""
        self._decoder, self._store, self._kernel = decoder, store, kernel
        self._most_blocks, self._capture, self._buckets = most_blocks, capture, buckets
        # By rows, first and last layer, and the adapters' identity.
        self._captured: dict[tuple[int, int, int, int], tuple[_Buffers, Replay]] = {}

    def run(
        self,
        spans: Sequenced[Span],
        hidden: Tensor,
        rotary: Rotary,
        first: int,
        end: int,
        adapted: Sequenced[tuple[slice, Adapters]],
    ) -> Tensor | None:
        """As `DecoderLayers.run` over these segments; None where no captured pass is for them."""
        size = next((size for size in self._buckets if size >= len(spans)), None)
        if size is None or not self._fits(spans, adapted):
            return None
        adapters = adapted[0][1] if adapted else None
        filling = [Span(0, 1, [self._store.blocks - 1])] * (size - len(spans))
        places = packed_places([*spans, *filling], self._store.block_tokens, self._most_blocks)
        key = size, first, end, id(adapters)
        captured = self._captured.get(key)
        buffers = captured[0] if captured else _Buffers.of(size, hidden, rotary, places)
        buffers.fill(hidden, rotary, places)
        if captured is None:
            # It is computed already while it is captured: as often as need be, the same rows into the same places.
            captured = buffers, self._capture(self._computing(size, buffers, first, end, adapters))
            self._captured[key] = captured
        return captured[1]()[: len(spans)].clone()

    def _fits(self, spans: Sequenced[Span], adapted: Sequenced[tuple[slice, Adapters]]) -> bool:
        """Single tokens that all pass the same adapters, or none."""
        alike = not adapted or [rows for rows, _ in adapted] == [slice(0, len(spans))]
        return alike and all(span.length == 1 and span.end <= self._most_tokens for span in spans)

    def _computing(
        self, size: int, buffers: _Buffers, first: int, end: int, adapters: Adapters | None
    ) -> Callable[[], Tensor]:
        adapted = [] if adapters is None else [(slice(0, size), adapters)]

        def compute() -> Tensor:
            # Numbers of the host are captured, too, so the longest sequence is the longest that there can be.
            places = Places.unpacked(buffers.places, size, size, 1, self._most_tokens)
            attention = FlashAttention(self._store, self._kernel, [1] * size, places)
            return self._decoder.run(buffers.hidden, buffers.rotary, attention, first, end, adapted)

        return compute

    @property
    def _most_tokens(self) -> int:
        return self._most_blocks * self._store.block_tokens
