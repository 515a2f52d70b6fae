"""Who holds which KV block: counting only. Knows no tensor."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field

# Unless the device's attention wants other ones.
BLOCK_TOKENS = 16


def prefix_hashes(route: str, token_ids: Sequenced[int], block_tokens: int = BLOCK_TOKENS) -> list[bytes]:
    """One hash for every full block of a prompt, each covering everything before it.

    The route is part of it, since the same tokens leave other KV behind on another cut.
    The last token is never covered: at least one must be computed to get logits.
    """
    hashes = []
    chained = hashlib.sha256(route.encode())
    for start in range(0, (len(token_ids) - 1) // block_tokens * block_tokens, block_tokens):
        chained.update(array("I", token_ids[start : start + block_tokens]).tobytes())
        hashes.append(chained.digest())
    return hashes


@dataclass(slots=True)
class _Holding:
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    published: int = 0


class BlockPool:
    """Hands out blocks of `block_tokens` tokens to sequences.

    A block whose content may serve another sequence with the same beginning stays known by its hash after its last
    holder is gone, until the room is needed: the longest unused goes first.
    """

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._held: dict[int, _Holding] = {}
        # Tokens of prompts that were looked up, and how many of them were here.
        self.asked_tokens = self.reused_tokens = 0

    @property
    def tokens(self) -> int:
        """For so many tokens there is room in all."""
        return self.blocks * self.block_tokens

    @property
    def free_blocks(self) -> int:
        """Blocks that can be handed out now; those that only remember a beginning among them."""
        return len(self._free) + len(self._idle)

    @property
    def usage(self) -> float:
        """The share of blocks that sequences hold, 0 to 1."""
        return 1.0 - self.free_blocks / self.blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return blocks_for(tokens, self.block_tokens)

    def hashes(self, route: str, token_ids: Sequenced[int]) -> list[bytes]:
        """`prefix_hashes` of a prompt in blocks of this pool."""
        return prefix_hashes(route, token_ids, self.block_tokens)

    def matching(self, hashes: Sequenced[bytes]) -> int:
        """How many leading blocks of a prompt are here already."""
        count = 0
        while count < len(hashes) and hashes[count] in self._block_of:
            count += 1
        return count

    def begin(self, number: int, hashes: Sequenced[bytes], reused: int) -> bool:
        """Starts a sequence that shares its first `reused` blocks; False where they are not all here."""
        if self.matching(hashes[:reused]) < reused:
            return False
        holding = _Holding(hashes=list(hashes), published=reused)
        for content in hashes[:reused]:
            block = self._block_of[content]
            self._holders[block] += 1
            self._idle.pop(block, None)
            holding.blocks.append(block)
        self._held[number] = holding
        self.asked_tokens += len(hashes) * self.block_tokens
        self.reused_tokens += reused * self.block_tokens
        return True

    def name(self, number: int, hashes: Sequenced[bytes]) -> None:
        """What a sequence that was begun without hashes holds: only now it is known, with its route."""
        self._held[number].hashes = list(hashes)

    def grow(self, number: int, tokens: int) -> bool:
        """Makes room for `tokens` tokens of a sequence in all; False, and nothing changed, where there is none."""
        holding = self._held[number]
        missing = self.blocks_for(tokens) - len(holding.blocks)
        if missing > self.free_blocks:
            return False
        for _ in range(missing):
            block = self._take()
            self._holders[block] = 1
            holding.blocks.append(block)
        return True

    def publish(self, number: int, tokens: int) -> None:
        """The first `tokens` tokens of a sequence are computed: others may share its full prompt blocks.

        Unknown numbers are fine: what is over has nothing to share.
        """
        holding = self._held.get(number)
        if holding is None:
            return
        ready = min(tokens // self.block_tokens, len(holding.hashes))
        for index in range(holding.published, ready):
            content, block = holding.hashes[index], holding.blocks[index]
            if content not in self._block_of:
                self._block_of[content] = block
                self._hash_of[block] = content
        holding.published = max(holding.published, ready)

    def blocks_of(self, number: int) -> list[int]:
        """The sequence's blocks in the order of its tokens; not to be changed."""
        return self._held[number].blocks

    def release(self, number: int) -> None:
        """The sequence is over. Unknown numbers are fine: closing twice does no harm."""
        holding = self._held.pop(number, None)
        # The end of a beginning goes back first, so that what many share is forgotten last.
        for block in reversed(holding.blocks if holding else []):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._put_back(block)

    def _put_back(self, block: int) -> None:
        if block in self._hash_of:
            self._idle[block] = None
        else:
            self._free.append(block)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block


def blocks_for(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_tokens)
