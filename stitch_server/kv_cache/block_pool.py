"""Which sequence holds which KV block, and which blocks are cached for a shared prefix.

A `BlockPool` hands out block numbers and counts the holders of each; it has no tensors. A full block of a prompt is
published under a hash of the tenant, the route and all tokens up to its end, and sequences with the same prefix share
it. A block may be published for several routes, and be one whose hidden states are kept. Such a block stays cached when
nobody holds it, until its room is needed, the least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field
from typing import Protocol

# The default block size; flash attention requires larger blocks.
BLOCK_TOKENS = 16


def prefix_hashes(salt: str, route: str, token_ids: Sequenced[int], block_tokens: int = BLOCK_TOKENS) -> list[bytes]:
    """One hash for every full block of a prompt, each over all tokens up to the block's end.

    The salt names who may find the blocks: with another one, no prompt shows whether they are cached. The route is
    hashed, too, since the KV of the same tokens differs between cuts. The last token is in no hashed block: at least
    one token must be computed to get logits.
    """
    hashes = []
    # The representation of the pair, which no other salt and route have.
    chained = hashlib.sha256(repr((salt, route)).encode())
    for start in range(0, (len(token_ids) - 1) // block_tokens * block_tokens, block_tokens):
        chained.update(array("I", token_ids[start : start + block_tokens]).tobytes())
        hashes.append(chained.digest())
    return hashes


class KeptBlocks(Protocol):
    """What is kept of blocks in addition to their KV, by which other sequences find them."""

    def holds(self, block: int) -> bool:
        """Whether sequences can find the block by what is kept of it."""

    def discard(self, block: int) -> None:
        """The block gets other tokens."""


@dataclass(slots=True)
class _SequenceBlocks:
    """The blocks of one sequence, the hashes of its prompt's full blocks, and how many of these are published."""

    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    published: int = 0
    # The blocks that it is expected to hold in the end.
    expected: int = 0

    @property
    def expected_growth(self) -> int:
        """The blocks that it is expected to take in addition to those that it holds."""
        return max(0, self.expected - len(self.blocks))


class BlockPool:
    """Hands out `blocks` blocks of `block_tokens` tokens to sequences."""

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS, kept: KeptBlocks | None = None) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._kept = kept
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._hashes_by_block: dict[int, list[bytes]] = {}
        self._block_by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._sequences: dict[int, _SequenceBlocks] = {}
        # Blocks that sequences are expected to take, in addition to those that they hold.
        self._expected_growth = 0
        # Prompt tokens that were looked up in the prefix cache, and those found there.
        self.queried_tokens = self.reused_tokens = 0

    @property
    def tokens(self) -> int:
        """The capacity of the pool in tokens."""
        return self.blocks * self.block_tokens

    @property
    def free_blocks(self) -> int:
        """Blocks that can be handed out now, including those cached only for their prefix."""
        return len(self._free) + len(self._cached)

    @property
    def room_tokens(self) -> int:
        """What new sequences may take: the free blocks less those that the sequences are expected to grow by."""
        return max(0, self.free_blocks - self._expected_growth) * self.block_tokens

    def has_room(self, tokens: int) -> bool:
        """Whether a new sequence that is expected to have `tokens` tokens in the end fits."""
        return self.blocks_for(tokens) * self.block_tokens <= self.room_tokens

    @property
    def usage(self) -> float:
        """The share of blocks that sequences hold, 0 to 1."""
        return 1.0 - self.free_blocks / self.blocks

    def blocks_for(self, tokens: int) -> int:
        """The number of blocks that hold `tokens` tokens."""
        return blocks_for(tokens, self.block_tokens)

    def hashes(self, salt: str, route: str, token_ids: Sequenced[int]) -> list[bytes]:
        """`prefix_hashes` of a prompt in blocks of this pool."""
        return prefix_hashes(salt, route, token_ids, self.block_tokens)

    def count_cached(self, hashes: Sequenced[bytes]) -> int:
        """How many leading blocks of a prompt are cached."""
        count = 0
        while count < len(hashes) and hashes[count] in self._block_by_hash:
            count += 1
        return count

    def begin(
        self,
        session_id: int,
        hashes: Sequenced[bytes],
        reused: int,
        expected_tokens: int = 0,
        found: Sequenced[int] = (),
    ) -> bool:
        """Starts a sequence that shares its first `reused` blocks; False if one of them is no longer cached.

        `expected_tokens`: its length in the end, for which `room_tokens` leaves blocks free. They are not its own: any
        sequence may grow into them. `found`: the first blocks of its tokens that are kept, which it shares from number
        `reused` on. They have the KV of lower layers; that of the others the sequence writes into them.
        """
        if self.count_cached(hashes[:reused]) < reused:
            return False
        held = _SequenceBlocks(hashes=list(hashes), published=reused, expected=self.blocks_for(expected_tokens))
        for block in [*(self._block_by_hash[content] for content in hashes[:reused]), *found[reused:]]:
            self._holders[block] += 1
            self._cached.pop(block, None)
            held.blocks.append(block)
        self._sequences[session_id] = held
        self._expected_growth += held.expected_growth
        self.queried_tokens += len(hashes) * self.block_tokens
        self.reused_tokens += reused * self.block_tokens
        return True

    def is_open(self, session_id: int) -> bool:
        """Whether the sequence has begun and is not released."""
        return session_id in self._sequences

    def set_hashes(self, session_id: int, hashes: Sequenced[bytes]) -> None:
        """Sets the hashes of a sequence that began without them, since its route was not decided yet."""
        self._sequences[session_id].hashes = list(hashes)

    def grow(self, session_id: int, tokens: int) -> bool:
        """Extends a sequence to `tokens` tokens; False, with nothing changed, if too few blocks are free."""
        held = self._sequences[session_id]
        missing = self.blocks_for(tokens) - len(held.blocks)
        if missing > self.free_blocks:
            return False
        self._expected_growth -= max(0, min(missing, held.expected_growth))
        for _ in range(missing):
            block = self._allocate()
            self._holders[block] = 1
            held.blocks.append(block)
        return True

    def publish(self, session_id: int, tokens: int) -> None:
        """Shares the full prompt blocks among a sequence's first `tokens` tokens, whose KV is computed.

        Does nothing for a sequence that is already released.
        """
        held = self._sequences.get(session_id)
        if held is None:
            return
        ready = min(tokens // self.block_tokens, len(held.hashes))
        for index in range(held.published, ready):
            content, block = held.hashes[index], held.blocks[index]
            if content not in self._block_by_hash:
                self._block_by_hash[content] = block
                self._hashes_by_block.setdefault(block, []).append(content)
        held.published = max(held.published, ready)

    def blocks_of(self, session_id: int) -> list[int]:
        """The sequence's blocks in the order of its tokens; the caller must not change the list."""
        return self._sequences[session_id].blocks

    def release(self, session_id: int) -> None:
        """Frees a sequence's blocks. Does nothing for one that is already released."""
        held = self._sequences.pop(session_id, None)
        if held is None:
            return
        self._expected_growth -= held.expected_growth
        # Later blocks first, so that the start of a prefix, which most sequences share, is evicted last.
        for block in reversed(held.blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free_block(block)

    def _free_block(self, block: int) -> None:
        if block in self._hashes_by_block or (self._kept is not None and self._kept.holds(block)):
            self._cached[block] = None
        else:
            self._forget(block)
            self._free.append(block)

    def _allocate(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        """No sequence finds the block any more."""
        for content in self._hashes_by_block.pop(block, ()):
            del self._block_by_hash[content]
        if self._kept is not None:
            self._kept.discard(block)


def blocks_for(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """The number of blocks that hold `tokens` tokens."""
    return -(-tokens // block_tokens)
