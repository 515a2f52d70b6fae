"""Attention by PyTorch's SDPA, on any device: gathers each sequence's keys and values from their blocks.

A batch is divided into attention groups, one SDPA call each: sequences that decode one token over contexts of similar
length form a padded decode group, and several new tokens of one sequence are a prefill chunk. Padding is masked, so a
sequence's result doesn't depend on its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stitch_server.kv_cache.store import KVStore, Span, slots_of

# A sequence joins a padded decode group if its context exceeds the group's shortest by at most this factor and these
# tokens.
MAX_PADDING_RATIO = 1.25
MAX_PADDING_TOKENS = 64
# The most slots that one group gathers, unless a single sequence has more: about what a CPU's caches hold.
MAX_GROUP_SLOTS = 8192


class _AttentionGroup(Protocol):
    """Tokens of a batch that attend in one SDPA call."""

    @property
    def rows(self) -> slice | Tensor:
        """Their indices in the batch."""
        ...

    @property
    def slots(self) -> Tensor:
        """The slots that they attend to."""
        ...

    def attend(self, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        """query `[rows, heads, head_dim]`, kv gathered from `slots`; returns `[rows, heads * head_dim]`."""
        ...


@dataclass(frozen=True, slots=True)
class _PaddedDecodeGroup:
    """Sequences with one new token each, whose contexts are padded to the longest one."""

    rows: slice | Tensor
    sequences: int
    # The contexts one after the other; a shorter one is padded with its own first slot.
    slots: Tensor
    # Masks the padding, [sequences, 1, 1, longest]; None without padding.
    mask: Tensor | None

    def attend(self, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        _, heads, head_dim = query.shape
        kv_heads = kv.shape[1] // 2
        context = kv.view(self.sequences, -1, 2 * kv_heads, head_dim).transpose(1, 2)
        # The query heads that share a KV head become rows of one small matmul, which spares expanding the keys.
        grouped = query.view(self.sequences, kv_heads, heads // kv_heads, head_dim)
        keys, values = context[:, :kv_heads], context[:, kv_heads:]
        attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scale)
        return attended.reshape(self.sequences, heads * head_dim)


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    """Several consecutive new tokens of one sequence."""

    rows: slice
    slots: Tensor
    # [length, end]; None if SDPA's own causal mask is the same.
    mask: Tensor | None

    def attend(self, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        tokens, heads, head_dim = query.shape
        kv_heads = kv.shape[1] // 2
        context = kv.transpose(0, 1)[None]
        attended = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            context[:, :kv_heads],
            context[:, kv_heads:],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        return attended[0].transpose(0, 1).reshape(tokens, heads * head_dim)


class SdpaAttention:
    """The `BatchAttention` of a batch on any device."""

    paged_kv = None

    def __init__(self, store: KVStore, spans: Sequenced[Span]) -> None:
        self._assign(store, spans, [slots_of(span, store.block_tokens, store.kv.device) for span in spans])

    def _assign(self, store: KVStore, spans: Sequenced[Span], slots: list[Tensor]) -> None:
        self._store, self._spans, self._slots = store, spans, slots
        new = [one[span.position :] for one, span in zip(slots, spans, strict=True)]
        self._new_slots = torch.cat(new) if new else torch.empty(0, dtype=torch.long, device=store.kv.device)
        # By the layers' window.
        self._groups: dict[int | None, list[_AttentionGroup]] = {}

    def leading(self, segments: int) -> SdpaAttention:
        """Attention for the first `segments` segments alone."""
        shorter = object.__new__(SdpaAttention)
        shorter._assign(self._store, self._spans[:segments], self._slots[:segments])
        return shorter

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `stitch_server.attention.Attend` defines."""
        self._store.write(layer, self._new_slots, key, value)
        if window not in self._groups:
            self._groups[window] = [*self._decode_groups(window), *self._prefill_chunks(window)]
        attended = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for group in self._groups[window]:
            kv = self._store.gather(layer, group.slots)
            attended[group.rows] = group.attend(query[group.rows], kv, scale)
        return attended

    def _row_bounds(self) -> list[int]:
        """Each segment's first row in the batch, and the number of rows."""
        return [0, *accumulate(span.length for span in self._spans)]

    def _decode_groups(self, window: int | None) -> list[_PaddedDecodeGroup]:
        bounds = self._row_bounds()
        decoding = {bounds[at]: self._slots[at] for at, span in enumerate(self._spans) if span.length == 1}
        visible = {row: slots if window is None else slots[-window:] for row, slots in decoding.items()}
        lengths = {row: len(slots) for row, slots in visible.items()}
        return [_padded_group({row: visible[row] for row in rows}, self._store.kv) for rows in group_by_length(lengths)]

    def _prefill_chunks(self, window: int | None) -> list[_PrefillChunk]:
        bounds = self._row_bounds()
        return [
            _PrefillChunk(slice(bounds[index], bounds[index + 1]), self._slots[index], self._mask(span, window))
            for index, span in enumerate(self._spans)
            if span.length > 1
        ]

    def _mask(self, span: Span, window: int | None) -> Tensor | None:
        window = window if window is not None and window < span.end else None
        return None if window is None and span.position == 0 else causal_mask(span, window, self._store.kv)


def group_by_length(lengths: Mapping[int, int]) -> list[list[int]]:
    """Keys of `lengths` in groups of similar lengths, none above `MAX_GROUP_SLOTS` padded slots."""
    groups: list[list[int]] = []
    for key in sorted(lengths, key=lambda key: (lengths[key], key)):
        if groups and _may_join(lengths[key], lengths[groups[-1][0]], len(groups[-1])):
            groups[-1].append(key)
        else:
            groups.append([key])
    return [sorted(group) for group in groups]


def _may_join(length: int, shortest: int, members: int) -> bool:
    similar = length <= shortest * MAX_PADDING_RATIO + MAX_PADDING_TOKENS
    return similar and length * (members + 1) <= MAX_GROUP_SLOTS


def _padded_group(contexts: Mapping[int, Tensor], like: Tensor) -> _PaddedDecodeGroup:
    """`contexts` are slots by row; the mask has the dtype of `like`."""
    lengths = [len(slots) for slots in contexts.values()]
    longest = max(lengths)
    padded = [torch.cat([slots, slots[:1].expand(longest - len(slots))]) for slots in contexts.values()]
    mask = None
    if min(lengths) < longest:
        padding = torch.arange(longest, device=like.device) >= torch.tensor(lengths, device=like.device)[:, None]
        mask = _additive_mask(padding, like)[:, None, None]
    return _PaddedDecodeGroup(_row_index(list(contexts), like), len(contexts), torch.cat(padded), mask)


def _row_index(rows: list[int], like: Tensor) -> slice | Tensor:
    """Ascending rows as an index: a slice, which makes a view, if they are adjacent."""
    adjacent = rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if adjacent else torch.tensor(rows, device=like.device)


def causal_mask(span: Span, window: int | None, like: Tensor) -> Tensor:
    """The mask of a span's new tokens, `[length, end]`: 0 where a token may look, minus infinity elsewhere."""
    rows = torch.arange(span.position, span.end, device=like.device)[:, None]
    columns = torch.arange(span.end, device=like.device)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return _additive_mask(hidden, like)


def _additive_mask(hidden: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: minus infinity where `hidden` is true."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
