"""When refused requests were told to come back, and how much room is kept for those that will.

A promise is found by a digest of the request. It can be redeemed from shortly before its time until some seconds after
it, and lapses then. Not every client returns: the share of promises that were redeemed is learned, and only that share
of the promised room is kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

# A client's timer and the network are this inexact.
EARLY_SECONDS = 0.5
GRACE_SECONDS = 5.0
# Of one tenant; what is refused beyond them gets a time without a promise.
MAX_PROMISES = 16_384
# The time before a promise, and after it, in which its room is counted; in how many steps room is looked for, and how
# exactly times are counted there. All that bounds the time that one refusal takes.
LEAST_SPAN_SECONDS, MOST_SPAN_SECONDS = 1.0, 16.0
MOST_STEPS = 64
BIN_SECONDS = 0.25
# The weight of one promise in the learned share of those that return: rather too much room is kept than too little.
RETURN_WEIGHT, ABSENCE_WEIGHT = 0.05, 0.02
LEAST_RETURN_SHARE = 0.1


@dataclass(frozen=True, slots=True, order=True)
class Promise:
    """The time for one refused request."""

    at: float
    digest: bytes
    # What it is expected to take when it comes back: seconds on shards, tokens of prompt and answer.
    seconds: float
    tokens: float


class Promises:
    """The promises that are neither redeemed nor lapsed, by tenant."""

    def __init__(self) -> None:
        # By time.
        self._pending: dict[str, list[Promise]] = defaultdict(list)
        self._by_digest: dict[tuple[str, bytes], list[Promise]] = {}
        # Seconds on shards by the bin of time in which they are promised.
        self._bins: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, float] = defaultdict(float)
        self.return_share = 1.0

    def __len__(self) -> int:
        return sum(map(len, self._pending.values()))

    def seconds(self, tenant: str) -> float:
        """On shards, of all that are expected to return."""
        return self._seconds[tenant] * self.return_share

    def tokens(self, tenant: str) -> float:
        """Of all that are expected to return."""
        return self._tokens[tenant] * self.return_share

    def seconds_due(self, tenant: str, until: float) -> float:
        """On shards, of those that are expected to return by then."""
        pending = self._pending[tenant]
        end = bisect_left(pending, until, key=lambda promise: promise.at)
        return sum(promise.seconds for promise in pending[:end]) * self.return_share

    def next_gap(self, tenant: str, at: float, seconds: float, rate: float) -> float:
        """The first time from `at` on around which there is room for one more that takes `seconds` on shards.

        `rate` is the room for the tenant's promised requests: seconds on shards for each second. Where one request
        takes all of it for longer than MOST_SPAN_SECONDS, there are too few to be bunched, and the first time is `at`.
        """
        span = max(LEAST_SPAN_SECONDS, seconds / rate)
        if span > MOST_SPAN_SECONDS:
            return at
        room, length = 1.001 * span * rate - seconds, math.ceil(span / BIN_SECONDS)
        promised = self._bins[tenant]
        for _ in range(MOST_STEPS):
            middle = _bin(at)
            spans = (range(middle - length + 1, middle + 1), range(middle, middle + length))
            if all(sum(promised.get(one, 0.0) for one in bins) * self.return_share <= room for bins in spans):
                break
            at += span / 4
        return at

    def add(self, tenant: str, promise: Promise) -> None:
        """Keeps the promise, unless the tenant has too many."""
        if len(self._pending[tenant]) >= MAX_PROMISES:
            return
        insort(self._pending[tenant], promise)
        insort(self._by_digest.setdefault((tenant, promise.digest), []), promise)
        self._count(tenant, promise, 1)

    def redeem(self, tenant: str, digest: bytes, now: float) -> Promise | None:
        """Takes the earliest promise of an equal request whose time has come; None: there is none."""
        found = self._by_digest.get((tenant, digest), [])
        if not found or now < found[0].at - EARLY_SECONDS:
            return None
        promise = found[0]
        self._remove(tenant, promise)
        self._learn(returned=True)
        return promise

    def lapse(self, now: float) -> int:
        """Drops those that were not redeemed in time, and returns how many."""
        dropped = 0
        for tenant, pending in self._pending.items():
            while pending and pending[0].at + GRACE_SECONDS < now:
                self._remove(tenant, pending[0])
                self._learn(returned=False)
                dropped += 1
        return dropped

    def _remove(self, tenant: str, promise: Promise) -> None:
        pending = self._pending[tenant]
        del pending[bisect_left(pending, promise)]
        same = self._by_digest[tenant, promise.digest]
        same.remove(promise)
        if not same:
            del self._by_digest[tenant, promise.digest]
        self._count(tenant, promise, -1)

    def _count(self, tenant: str, promise: Promise, sign: int) -> None:
        bins, index = self._bins[tenant], _bin(promise.at)
        bins[index] += sign * promise.seconds
        # Sums of numbers that were added and subtracted are inexact.
        if bins[index] < BIN_SECONDS / 1e3:
            del bins[index]
        self._seconds[tenant] = max(0.0, self._seconds[tenant] + sign * promise.seconds)
        self._tokens[tenant] = max(0.0, self._tokens[tenant] + sign * promise.tokens)

    def _learn(self, returned: bool) -> None:
        weight = RETURN_WEIGHT if returned else ABSENCE_WEIGHT
        self.return_share = max(LEAST_RETURN_SHARE, self.return_share + weight * (returned - self.return_share))


def _bin(at: float) -> int:
    return math.floor(at / BIN_SECONDS)
