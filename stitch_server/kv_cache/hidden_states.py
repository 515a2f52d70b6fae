"""Hidden states at the cuts of routes, kept for the tokens of KV blocks: what a costlier route continues from.

A bottom shard keeps the states that it sends on. In: the states of a session's consecutive tokens after the layers of
its route. Out: for other tokens with the same prefix, the blocks that have the KV of those layers, and the states. A
session of another route shares these blocks, and computes only the layers after the cut. Invariants: what is kept takes
no more than the given bytes; the least recently used prefix is evicted first, from its end on; a block is found only
after all earlier ones of its prefix, by the tenant that has computed it. Each block that is kept or evicted takes the
same time, however long its prefix is.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stitch_server.devices import to_device_async


class Match(NamedTuple):
    """The leading blocks of a prompt whose states are kept, and the layers after which these are."""

    layer: int
    blocks: Sequence[int]


NO_MATCH = Match(0, ())


class _Key(NamedTuple):
    block: int
    layer: int


@dataclass(slots=True, eq=False)
class _Kept:
    """The states of one block after one layer."""

    key: _Key
    # Of the tensor.
    row: int
    # The block before it; None: it is the first of its prefix.
    previous: _Kept | None
    # The kept blocks that follow it.
    following: int = 0
    # Leading tokens of the block whose states are written.
    tokens: int = 0
    # The hash of all tokens up to the block's end; empty until the block is full.
    name: bytes = b""


class HiddenStateCache:
    """Rows of `block_tokens` hidden states, by block and layer."""

    def __init__(
        self,
        capacity_bytes: int,
        first_layer: int,
        layers: Sequence[int],
        hidden_size: int,
        device: torch.device,
        dtype: torch.dtype,
        blocks: int,
        block_tokens: int,
    ) -> None:
        """For a shard from `first_layer` on: `layers` are those after which states are kept.

        `blocks` is the number of KV blocks; there are no more rows than these can use. Raises ValueError where no row
        fits into `capacity_bytes`.
        """
        self._first_layer = first_layer
        self.layers = sorted(layers)
        self._block_tokens = block_tokens
        rows = min(capacity_bytes // (block_tokens * hidden_size * dtype.itemsize), blocks * len(layers))
        if not rows:
            raise ValueError(f"{capacity_bytes} bytes hold no block of hidden states")
        # Uninitialized: no slot is read before it is written.
        self._states = torch.empty(rows * block_tokens, hidden_size, device=device, dtype=dtype)
        self._free = list(range(rows - 1, -1, -1))
        self._kept: dict[_Key, _Kept] = {}
        # Those that no other follows, the least recently used first.
        self._ends: OrderedDict[_Key, _Kept] = OrderedDict()
        self._key_by_name: dict[bytes, _Key] = {}
        # Tokens whose lower layers were not computed again.
        self.resumed_tokens = 0

    @property
    def nbytes(self) -> int:
        """The bytes that the states take at most."""
        return self._states.nbytes

    @property
    def usage(self) -> float:
        """The share of rows with states, 0 to 1."""
        return 1.0 - len(self._free) * self._block_tokens / len(self._states)

    def match(self, salt: str, token_ids: Sequence[int], last_layer: int, reused_blocks: int = 0) -> Match:
        """What spares most layers of a session up to `last_layer` whose first `reused_blocks` are cached anyway."""
        found = [Match(layer, self._find(salt, token_ids, layer)) for layer in self.layers if layer <= last_layer]
        longer = [one for one in found if len(one.blocks) > reused_blocks]

        def spared(match: Match) -> int:
            return (len(match.blocks) - reused_blocks) * (match.layer - self._first_layer)

        return max(longer, key=spared, default=NO_MATCH)

    def read(self, layer: int, blocks: Sequence[int], position: int, tokens: int) -> Tensor | None:
        """The states `[n, hidden]` of the first n of `tokens` tokens of a sequence, as many as are kept; None: none."""
        slots: list[int] = []
        for at in range(position, position + tokens):
            index, offset = divmod(at, self._block_tokens)
            kept = self._kept.get(_Key(blocks[index], layer))
            if kept is None or offset >= kept.tokens:
                break
            slots.append(kept.row * self._block_tokens + offset)
        self.resumed_tokens += len(slots)
        return self._states[self._index(slots)] if slots else None

    def reserve(
        self, salt: str, token_ids: Sequence[int], layer: int, blocks: Sequence[int], position: int, tokens: int
    ) -> list[int]:
        """The slots for the states of `tokens` tokens of a sequence from `position` on; fewer where it has no more.

        `token_ids` are all known ones of the sequence. Writes to the slots with `write`, before anything is read.
        """
        slots: list[int] = []
        end = position + tokens
        while position < end:
            index, offset = divmod(position, self._block_tokens)
            kept = self._row_for(blocks, index, layer, offset)
            if kept is None:
                break
            length = min(end - position, self._block_tokens - offset)
            first = kept.row * self._block_tokens + offset
            slots.extend(range(first, first + length))
            kept.tokens = max(kept.tokens, offset + length)
            position += length
            if offset + length == self._block_tokens and not kept.name:
                self._publish(salt, token_ids, layer, blocks, index)
        return slots

    def write(self, slots: Sequence[int], states: Tensor) -> None:
        """Keeps the states `[slots, hidden]`."""
        if slots:
            self._states.index_copy_(0, self._index(slots), states.to(self._states.dtype))

    def holds(self, block: int) -> bool:
        """Whether sequences can find the block."""
        keys = [_Key(block, layer) for layer in self.layers]
        return any(self._key_by_name.get(kept.name) == key for key in keys if (kept := self._kept.get(key)))

    def discard(self, block: int) -> None:
        """Frees the states of a block, which gets other tokens."""
        for layer in self.layers:
            if (kept := self._kept.get(_Key(block, layer))) is not None:
                self._release(kept)

    def _find(self, salt: str, token_ids: Sequence[int], layer: int) -> list[int]:
        """The leading blocks of the tokens that have states after `layer`."""
        found: list[int] = []
        name = _first_name(salt, layer)
        for start in range(0, len(token_ids) - self._block_tokens + 1, self._block_tokens):
            name = _next_name(name, token_ids[start : start + self._block_tokens])
            key = self._key_by_name.get(name)
            if key is None:
                break
            found.append(key.block)
        for block in reversed(found):
            if (key := _Key(block, layer)) in self._ends:
                self._ends.move_to_end(key)
        return found

    def _row_for(self, blocks: Sequence[int], index: int, layer: int, offset: int) -> _Kept | None:
        """Where a block's states from `offset` on go; None where they would continue nothing."""
        key = _Key(blocks[index], layer)
        if (kept := self._kept.get(key)) is not None:
            return kept if offset <= kept.tokens else None
        previous = self._kept.get(_Key(blocks[index - 1], layer)) if index else None
        if offset or (index and (previous is None or not previous.name)) or not self._make_room(previous):
            return None
        kept = self._kept[key] = self._ends[key] = _Kept(key, self._free.pop(), previous)
        if previous is not None:
            previous.following += 1
            self._ends.pop(previous.key, None)
        return kept

    def _make_room(self, previous: _Kept | None) -> bool:
        """Frees a row where none is free; False where `previous`, which is in use, is the only end."""
        if self._free:
            return True
        oldest = next(iter(self._ends.values()))
        if oldest is not previous:
            self._release(oldest)
        return bool(self._free)

    def _release(self, kept: _Kept) -> None:
        """Frees the row of a block; the end of its prefix is then the block before it, unless others follow that."""
        del self._kept[kept.key]
        self._ends.pop(kept.key, None)
        self._free.append(kept.row)
        if self._key_by_name.get(kept.name) == kept.key:
            del self._key_by_name[kept.name]
        previous = kept.previous
        if previous is None:
            return
        previous.following -= 1
        if not previous.following and self._kept.get(previous.key) is previous:
            self._ends[previous.key] = previous
            self._ends.move_to_end(previous.key, last=False)

    def _name_of(self, block: int, layer: int) -> bytes:
        kept = self._kept.get(_Key(block, layer))
        return b"" if kept is None else kept.name

    def _publish(self, salt: str, token_ids: Sequence[int], layer: int, blocks: Sequence[int], index: int) -> None:
        """Lets others find a block that is full, under the hash of all of its tokens; not where these are unknown."""
        start, end = index * self._block_tokens, (index + 1) * self._block_tokens
        if end > len(token_ids):
            return
        previous = _first_name(salt, layer) if index == 0 else self._name_of(blocks[index - 1], layer)
        key = _Key(blocks[index], layer)
        name = self._kept[key].name = _next_name(previous, token_ids[start:end])
        self._key_by_name.setdefault(name, key)

    def _index(self, slots: Sequence[int]) -> Tensor:
        return to_device_async(torch.tensor(slots), self._states.device)


def _first_name(salt: str, layer: int) -> bytes:
    """What the names of a tenant's blocks begin with."""
    return hashlib.sha256(repr((salt, layer)).encode()).digest()


def _next_name(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a block with these tokens, after a block of the name `previous`."""
    return hashlib.sha256(previous + array("I", token_ids).tobytes()).digest()
