"""The KV tensors of one shard's layers, in blocks. Knows no session, only which blocks a segment reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stitch_server.attention.flash import FlashAttention, Kernel
from stitch_server.huge_pages import HugePageArena
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.span import BatchAttend, Span, slots_of, within

if TYPE_CHECKING:
    from stitch_server.cpu.scalars import Numbers

# How much longer than the shortest past of a crowd its longest may be: a share, and some tokens.
MOST_FILLING = 1.25
FILLING_TOKENS = 64
# What compiled kernels read on a processor.
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
# Tokens that one call gathers at most, unless a single sequence has more.
CROWD_TOKENS = 8192


class KVStore:
    """Keys and values of layers `[first, end)` for `blocks` blocks; a `kernel` attends for a whole batch at once."""

    def __init__(
        self,
        first: int,
        end: int,
        blocks: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        block_tokens: int = BLOCK_TOKENS,
        kernel: Kernel | None = None,
    ) -> None:
        self.first, self.end = first, end
        self.blocks, self.block_tokens, self.kernel = blocks, block_tokens, kernel
        # A token's keys and values side by side, so that one gather fetches both. Not filled: a processor's memory is
        # taken page by page, when a block is first written, and never read before.
        shape = (end - first, blocks * block_tokens, 2 * kv_heads, head_dim)
        on_processor = device.type == "cpu"
        self.kv = (
            HugePageArena().allocate(shape, dtype) if on_processor else torch.empty(shape, dtype=dtype, device=device)
        )
        self.keys, self.values = self.kv[:, :, :kv_heads], self.kv[:, :, kv_heads:]
        # The same as kernels read it; None where these don't attend.
        in_kernels = on_processor and dtype in KERNEL_DTYPES
        self._numbers: Numbers | None = _compiled().compiled_for(self.kv) if in_kernels else None

    def attention(self, spans: Sequenced[Span]) -> BatchAttend:
        """The `attend` function for a batch of packed segments."""
        if self.kernel is not None:
            return FlashAttention.of(self, self.kernel, spans)
        if self._numbers is not None:
            attention: BatchAttend = _compiled().CompiledAttention(self._numbers, self.first, self.block_tokens, spans)
            return attention
        return PagedAttention(self, spans)


class _Part(Protocol):
    """Some rows of a batch, which attend in one call."""

    @property
    def rows(self) -> slice | Tensor:
        """Where they are in the batch."""
        ...

    def attend(self, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        """query `[rows, heads, head_dim]`, one layer's `kv`; returns `[rows, heads * head_dim]`."""
        ...


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Sequences with one new token each and pasts of similar length, gathered."""

    rows: slice | Tensor
    count: int
    # Each one's past and present, one behind the other; shorter ones are filled up with their own first token.
    slots: Tensor
    # What hides the filling, [count, 1, 1, longest]; None where there is none.
    mask: Tensor | None

    def attend(self, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        return _decode(query, kv.index_select(0, self.slots), self, scale)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several consecutive tokens of one sequence."""

    rows: slice
    slots: Tensor
    # [length, end]; None where SDPA's own causal mask says the same.
    mask: Tensor | None

    def attend(self, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        return _prefill(query, kv.index_select(0, self.slots), self, scale)


class PagedAttention:
    """Writes a batch's new keys and values into their blocks and attends over each segment's own past.

    For any device: it gathers tokens from their blocks and calls PyTorch's SDPA, once for all sequences that decode
    behind pasts of similar length.
    """

    paged = None

    def __init__(self, store: KVStore, spans: Sequenced[Span]) -> None:
        self._store = store
        self._spans = spans
        self._slots = [slots_of(span, store.block_tokens, store.kv.device) for span in spans]
        self._new_slots = self._new()
        # By the layers' window.
        self._parts: dict[int | None, list[_Part]] = {}

    def first(self, segments: int) -> PagedAttention:
        """As `BatchAttend` says."""
        part = object.__new__(PagedAttention)
        part._store, part._parts = self._store, {}
        part._spans, part._slots = self._spans[:segments], self._slots[:segments]
        part._new_slots = part._new()
        return part

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """query `[tokens, heads, head_dim]`, key and value `[tokens, kv_heads, head_dim]`, rotated.

        Returns `[tokens, heads * head_dim]`. `window`: how many tokens back a token sees, itself included.
        """
        index = layer - self._store.first
        self._store.keys[index].index_copy_(0, self._new_slots, key)
        self._store.values[index].index_copy_(0, self._new_slots, value)
        if window not in self._parts:
            self._parts[window] = [*self._decoding(window), *self._chunks(window)]
        kv = self._store.kv[index]
        attended = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for part in self._parts[window]:
            attended[part.rows] = part.attend(query[part.rows], kv, scale)
        return attended

    def _new(self) -> Tensor:
        """The slots of the tokens that this batch adds."""
        new = [slots[span.position :] for slots, span in zip(self._slots, self._spans, strict=True)]
        return torch.cat(new) if new else torch.empty(0, dtype=torch.long, device=self._store.kv.device)

    def _rows(self) -> list[int]:
        """Each segment's first row in the batch, and one behind the last."""
        return [0, *accumulate(span.length for span in self._spans)]

    def _decoding(self, window: int | None) -> list[_Crowd]:
        rows = self._rows()
        singles = {rows[at]: self._slots[at] for at, span in enumerate(self._spans) if span.length == 1}
        visible = {row: within(slots, window) for row, slots in singles.items()}
        lengths = {row: len(slots) for row, slots in visible.items()}
        return [_crowd({row: visible[row] for row in members}, self._store.kv) for members in _alike(lengths)]

    def _chunks(self, window: int | None) -> list[_Chunk]:
        rows = self._rows()
        return [
            _Chunk(slice(rows[index], rows[index + 1]), self._slots[index], self._mask(span, window))
            for index, span in enumerate(self._spans)
            if span.length > 1
        ]

    def _mask(self, span: Span, window: int | None) -> Tensor | None:
        window = window if window is not None and window < span.end else None
        return None if window is None and span.position == 0 else causal_mask(span, window, self._store.kv)


def _alike(lengths: Mapping[int, int]) -> list[list[int]]:
    """Keys in groups of similar lengths, each group small enough for the caches of a processor."""
    groups: list[list[int]] = []
    for key in sorted(lengths, key=lambda key: (lengths[key], key)):
        if groups and _joins(lengths[key], lengths[groups[-1][0]], len(groups[-1])):
            groups[-1].append(key)
        else:
            groups.append([key])
    return [sorted(group) for group in groups]


def _joins(length: int, shortest: int, members: int) -> bool:
    similar = length <= shortest * MOST_FILLING + FILLING_TOKENS
    return similar and length * (members + 1) <= CROWD_TOKENS


def _compiled() -> ModuleType:
    # Only who needs it pays for loading the compiler.
    from stitch_server.attention import cpu as compiled_attention

    return compiled_attention


def _crowd(slots: Mapping[int, Tensor], like: Tensor) -> _Crowd:
    """`slots` by row; the mask in the dtype of `like`."""
    lengths = [len(one) for one in slots.values()]
    longest = max(lengths)
    filled = [torch.cat([one, one[:1].expand(longest - len(one))]) for one in slots.values()]
    mask = None
    if min(lengths) < longest:
        filling = torch.arange(longest, device=like.device) >= torch.tensor(lengths, device=like.device)[:, None]
        mask = _hiding(filling, like)[:, None, None]
    return _Crowd(_where(list(slots), like), len(slots), torch.cat(filled), mask)


def _where(rows: list[int], like: Tensor) -> slice | Tensor:
    """Rows in ascending order, as an index: a view of the batch where they are neighbours."""
    together = rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=like.device)


def _decode(query: Tensor, kv: Tensor, crowd: _Crowd, scale: float) -> Tensor:
    _, heads, head_dim = query.shape
    kv_heads = kv.shape[1] // 2
    past = kv.view(crowd.count, -1, 2 * kv_heads, head_dim).transpose(1, 2)
    # The query heads of a group become rows of one small product, which spares expanding the keys.
    grouped = query.view(crowd.count, kv_heads, heads // kv_heads, head_dim)
    keys, values = past[:, :kv_heads], past[:, kv_heads:]
    attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=crowd.mask, scale=scale)
    return attended.reshape(crowd.count, heads * head_dim)


def _prefill(query: Tensor, kv: Tensor, chunk: _Chunk, scale: float) -> Tensor:
    tokens, heads, head_dim = query.shape
    kv_heads = kv.shape[1] // 2
    past = kv.transpose(0, 1)[None]
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        past[:, :kv_heads],
        past[:, kv_heads:],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return attended[0].transpose(0, 1).reshape(tokens, heads * head_dim)


def causal_mask(span: Span, window: int | None, like: Tensor) -> Tensor:
    """What each new token sees, `[length, end]`: 0 where it may look, minus infinity elsewhere."""
    rows = torch.arange(span.position, span.end, device=like.device)[:, None]
    columns = torch.arange(span.end, device=like.device)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return _hiding(hidden, like)


def _hiding(hidden: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: minus infinity where `hidden` is true."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
