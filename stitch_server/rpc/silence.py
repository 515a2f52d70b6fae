"""How long the next shards may be silent before they are suspect.

A next shard is asked for a heartbeat while it owes an answer, and answers at once. So silence shows that its process is
stopped, that its link is cut off in one direction or both, or that its engine is stuck: none of them depends on how
long its passes take, or on how many sessions of others wait there. The bound is learned from the silences of all next
shards: on busy machines they are longer.
"""

from __future__ import annotations

from collections import deque

# How often the silences are counted up.
TICK_SECONDS = 0.05
# A next shard that sends nothing is asked for a heartbeat after this, where no step waits after the longer time.
ASK_SECONDS, IDLE_ASK_SECONDS = 0.2, 1.0
# The bound is this many times the silence that nine of ten latest ones do not exceed, within these limits.
FACTOR = 4.0
LEAST_SECONDS, MOST_SECONDS = 1.0, 4.0
# While fewer silences are known.
FIRST_SECONDS = 2.0
FEW, RECENT = 8, 128
# For a next shard without a replica: to wait for it is all that can be done.
ALONE_SECONDS = 10.0
# From the opening of a link to its welcome, while no other link has been opened.
OPENING_SECONDS = 2.0
# Hidden states may take a link this long, at a rate that slow links have, before a heartbeat passes.
SLOW_BYTES_PER_SECOND = 1 << 20
# After this share of the bound a next shard is doubted: it keeps its sessions, and gets no new ones. One whose link is
# being opened is not, until it is known how long that takes.
DOUBTED_SHARE = 0.5


class SilenceBound:
    """The bound that all links of a shard share, for the silences of open links or for those from opening to welcome.

    It is `first_seconds` while fewer than `few` silences are known.
    """

    def __init__(self, first_seconds: float = FIRST_SECONDS, few: int = FEW) -> None:
        self._first_seconds = first_seconds
        self._few = few
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def is_learned(self) -> bool:
        return len(self._recent) >= self._few

    def learn(self, seconds: float) -> None:
        """A silence that ended."""
        self._recent.append(seconds)

    def seconds(self, unheard_bytes: int = 0) -> float:
        """How long a next shard with a replica may be silent, after it was sent that much."""
        bound = self._first_seconds
        if self.is_learned:
            bound = max(LEAST_SECONDS, FACTOR * sorted(self._recent)[len(self._recent) * 9 // 10])
        return min(bound + unheard_bytes / SLOW_BYTES_PER_SECOND, MOST_SECONDS)
