"""Which chains have computed the leading tokens of prompts, so that prompts that begin with them can go there again.

In: a prompt, and the chain on which its session got a token. Out: for another prompt, how many of its leading tokens
each chain, and each beginning of one, has computed. That is a hint: a shard may have freed its KV since. Invariant:
a prompt finds what its own tenant has computed on the same route, as on the shards.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

# The shortest prefix: a KV block of a CPU. Further ones are longer by an eighth each, so that a prompt has few.
BLOCK_TOKENS = 16
# Prefixes that are kept, those of the latest prompts, and chains of each.
MAX_PREFIXES = 50_000
MAX_CHAINS = 8

Names = tuple[str, ...]


class Prefixes:
    """The chains by prefix."""

    def __init__(self) -> None:
        self._chains: OrderedDict[bytes, tuple[Names, ...]] = OrderedDict()

    def record(self, tenant: str, route: str, token_ids: Sequence[int], chain: Names) -> None:
        """The shards of `chain` have computed the prompt."""
        for _, key in _prefixes(tenant, route, token_ids):
            others = (known for known in self._chains.pop(key, ()) if known != chain)
            self._chains[key] = (chain, *others)[:MAX_CHAINS]
        while len(self._chains) > MAX_PREFIXES:
            self._chains.popitem(last=False)

    def computed(self, tenant: str, route: str, token_ids: Sequence[int]) -> Mapping[Names, int]:
        """The leading tokens of the prompt that were computed, by the first shards of a chain: one or more of them.

        Later shards have the KV of sessions that came over the same earlier ones.
        """
        found: dict[Names, int] = {}
        for tokens, key in _prefixes(tenant, route, token_ids):
            for chain in self._chains.get(key, ()):
                for end in range(1, len(chain) + 1):
                    found[chain[:end]] = tokens
        return found


def _prefixes(tenant: str, route: str, token_ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The length and the hash of some prefixes of a prompt, the shortest first."""
    hashed = hashlib.blake2b(repr((tenant, route)).encode(), digest_size=16)
    content, begin, blocks = memoryview(array("I", token_ids)), 0, 1
    # A shard computes a prompt's last token in any case.
    while (end := blocks * BLOCK_TOKENS) < len(token_ids):
        hashed.update(content[begin:end])
        yield end, hashed.copy().digest()
        begin, blocks = end, blocks + max(1, blocks // 8)
