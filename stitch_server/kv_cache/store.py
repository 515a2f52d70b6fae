"""The KV tensors of one shard's layers, in blocks of `block_tokens` slots, and the `Span` of a sequence in them.

Takes slots (`block * block_tokens + offset`) and returns or writes their keys and values. Which sequence holds a block
is the `BlockPool`'s business, and which slots a batch reads is that of the attention back end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stitch_server.devices import HugePageArena
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Span:
    """`length` new tokens of a sequence after its `position` cached ones; `blocks` have room for all of them."""

    position: int
    length: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """The KV length of the sequence once the new tokens are written."""
        return self.position + self.length


def slots_of(span: Span, block_tokens: int, device: torch.device) -> Tensor:
    """The slots of a sequence's tokens, cached and new, `[position + length]`."""
    blocks = torch.tensor(span.blocks, device=device)
    return (blocks[:, None] * block_tokens + torch.arange(block_tokens, device=device)).view(-1)[: span.end]


class KVStore:
    """Keys and values of layers `[first, end)` for `blocks` blocks."""

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
    ) -> None:
        self.first, self.end = first, end
        self.blocks, self.block_tokens = blocks, block_tokens
        # A token's keys and values are adjacent, so that one gather fetches both. Uninitialized: the pages of a CPU's
        # memory are mapped one by one, when a block is first written, and no slot is read before it is written.
        shape = (end - first, blocks * block_tokens, 2 * kv_heads, head_dim)
        on_cpu = device.type == "cpu"
        self.kv = HugePageArena().allocate(shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=device)
        self._keys, self._values = self.kv[:, :, :kv_heads], self.kv[:, :, kv_heads:]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes key and value `[tokens, kv_heads, head_dim]` of `layer` into `slots` `[tokens]`."""
        self._keys[layer - self.first].index_copy_(0, slots, key)
        self._values[layer - self.first].index_copy_(0, slots, value)

    def gather(self, layer: int, slots: Tensor) -> Tensor:
        """A copy of the keys and values in `slots` `[tokens]`: `[tokens, 2 * kv_heads, head_dim]`, keys first."""
        return self.kv[layer - self.first].index_select(0, slots)

    def paged(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of all keys and all values of `layer`, `[blocks, block_tokens, kv_heads, head_dim]` each."""
        keys, values = self._keys[layer - self.first], self._values[layer - self.first]
        shape = self.blocks, self.block_tokens, *keys.shape[1:]
        return keys.view(shape), values.view(shape)
