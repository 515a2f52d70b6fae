"""Finds streams that wait for a token from a silent shard, and replicas that are far slower than their peers.

In: the sessions that are placed now. Out: polls of the shards of an overdue stream, the end of the stream where one of
them is silent, ejections. A stream is overdue by its replicas' own time for a token, so nothing is done per token.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from statistics import median
from weakref import WeakKeyDictionary

from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.placement import PlacedSession, Placement
from router_gateway.shards.replica import HealthPolicy, Replica

# Samples before a replica is compared with its peers, and the weight of one sample in its mean.
MIN_SAMPLES = 20
SAMPLE_WEIGHT = 0.05
# Means without a sample for this long are of another load.
MAX_AGE_SECONDS = 10.0
# A shard says that another one is suspect after so much silence at least: `stitch_server/rpc/silence.py`.
SUSPECTED_SECONDS = 0.5


@dataclass(slots=True)
class MeanTokenTime:
    """The mean time for a token of the sessions on one replica."""

    seconds: float = 0.0
    samples: int = 0
    at: float = 0.0
    # Since when it is far above that of the replica's peers; None: it isn't.
    slow_since: float | None = None

    def observe(self, seconds: float, now: float) -> None:
        self.samples += 1
        self.seconds += max(SAMPLE_WEIGHT, 1 / self.samples) * (seconds - self.seconds)
        self.at = now


class ProgressMonitor:
    """Checks every session that is placed, at a fixed interval."""

    def __init__(self, placement: Placement, health: HealthPolicy, ejection: EjectionPolicy) -> None:
        self._placement = placement
        self._health = health
        self._ejection = ejection
        self._token_times: WeakKeyDictionary[Replica, MeanTokenTime] = WeakKeyDictionary()

    async def run(self) -> None:
        """Checks until it is cancelled."""
        while True:
            await asyncio.sleep(self._health.check_seconds)
            self.check()

    def check(self) -> None:
        """Polls and ends what is overdue now, and ejects what is slow."""
        now, sessions = self._placement.clock(), list(self._placement.sessions)
        heard: set[Replica] = set()
        for session in sessions:
            if session.tokens != session.sampled[0]:
                # A token passes every shard of its chain.
                heard.update(session.chain.replicas)
                self._observe(session, now)
        for replica in self._placement.replicas:
            replica.check_silence(replica in heard)
        for session in sessions:
            if not session.tokens and session.chain.first.polled_at <= session.last_at:
                # The next shards are watched by those before them.
                session.chain.first.start_poll()
            if self._is_overdue(session, now):
                self._check_shards(session, now)
        self._eject_slow(now)

    def _observe(self, session: PlacedSession, now: float) -> None:
        """Takes what came since the latest check as a sample of each of its shards."""
        tokens, at = session.sampled
        session.sampled = (session.tokens, session.last_at)
        for replica in session.chain.replicas if tokens else ():
            time = self._token_times.setdefault(replica, MeanTokenTime())
            time.observe((session.last_at - at) / (session.tokens - tokens), now)

    def _is_overdue(self, session: PlacedSession, now: float) -> bool:
        waits = now - session.last_at
        if waits < self._health.overdue_seconds:
            return False
        if not session.tokens:
            return True
        times = [self._token_times[one].seconds for one in session.chain.replicas if one in self._token_times]
        return waits >= self._health.overdue_tokens * max(times, default=0.0)

    def _check_shards(self, session: PlacedSession, now: float) -> None:
        """Polls the shards of an overdue stream, and ends it where one of them is silent."""
        for replica in session.chain.replicas:
            if now - replica.polled_at >= self._health.overdue_seconds:
                replica.start_poll()
            if not self._is_lost(session, replica, now):
                continue
            replica.ejection.eject("unreachable", "it does not answer while sessions wait for tokens")
            session.end_for_silence(replica)
            return

    def _is_lost(self, session: PlacedSession, replica: Replica, now: float) -> bool:
        """Whether the session goes on elsewhere: the replica is gone, or silent while a peer of it is not.

        Before its first token a session loses what it has waited for, so it goes as soon as half of that was silence:
        of the replica to this gateway, or to another shard of the chain.
        """
        peers = (one for one in self._placement.peers(replica) if one.accepts_requests and not one.avoided)
        silence = replica.unanswered_seconds if replica.doubted else 0.0
        if not replica.suspected_by.isdisjoint(session.chain.names):
            silence = max(silence, SUSPECTED_SECONDS)
        loses_little = not session.tokens and now - session.last_at <= 2 * silence
        return not replica.serving or ((replica.silent or loses_little) and any(peers))

    def _eject_slow(self, now: float) -> None:
        policy = self._ejection
        times = {one: time for one, time in self._token_times.items() if _is_fresh(time, now) and one.accepts_requests}
        for replica, time in times.items():
            peers = [times[one].seconds for one in self._placement.peers(replica) if one in times]
            limit = max(policy.slow_factor * median(peers), policy.slow_token_seconds) if peers else float("inf")
            if time.seconds <= limit:
                time.slow_since = None
                continue
            time.slow_since = now if time.slow_since is None else time.slow_since
            if now - time.slow_since >= policy.slow_seconds:
                took = f"a token takes {time.seconds:.3f} s, on its peers {median(peers):.3f} s"
                replica.ejection.eject("slow", took)
                del self._token_times[replica]


def _is_fresh(time: MeanTokenTime, now: float) -> bool:
    return time.samples >= MIN_SAMPLES and now - time.at <= MAX_AGE_SECONDS
