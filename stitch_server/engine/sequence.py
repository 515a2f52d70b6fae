"""What a shard keeps of one session. Knows neither who asked for it nor how it is computed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from stitch.sampling import Sampling

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class Sequence:
    """One session on this shard; the engine thread alone touches it."""

    route: str
    # Addresses of the shards behind this one.
    chain: tuple[str, ...]
    sampling: Sampling
    # The prompt and what has been generated since, as far as this shard is told.
    token_ids: list[int]
    prompt_tokens: int
    # Unique in this process, also on the link to the next shard.
    number: int = field(default_factory=lambda: next(_numbers))
    # Counts the times that it began anew; what belongs to an earlier one is void.
    epoch: int = 0
    # Tokens whose KV is in this shard's cache, or on the way into it.
    cached: int = 0
    # Of these, tokens that another session had left there.
    reused: int = 0
    # Whether the next shard knows it already.
    opened: bool = False
