"""The sessions and the KV tokens of one shard as the gateway reckons them between two polls.

In: the sessions that this gateway places, and the shard's own figures. A session reserves the KV of its prompt and its
longest answer until it ends; what it holds already is in the shard's figure of free KV, so that it counts once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from stitch.v1 import shard_pb2

# How far placement lets replicas differ for the sake of prefixes that one of them has computed.
MORE_SHARE, MORE_SESSIONS = 1.1, 1


class KvHolder(Protocol):
    """A session as its KV tokens."""

    @property
    def reserved_tokens(self) -> int:
        """What it may need: prompt and longest answer."""

    @property
    def held_tokens(self) -> int:
        """What it holds: prompt and answer so far; 0 before its first token."""


class Placed(NamedTuple):
    """What this gateway had placed on the shard when it asked for its state."""

    sessions: int
    held_tokens: int


class ReplicaLoad:
    """The load of one replica."""

    def __init__(self) -> None:
        self._sessions: set[KvHolder] = set()
        self._reserved_tokens = 0
        # By the latest poll: free KV, had this gateway placed nothing, and the sessions of other gateways.
        self._free_tokens = 0
        self._other_sessions = 0
        self._capacity_tokens = 0

    @property
    def sessions(self) -> int:
        """Sessions of this gateway now, and of others at the latest poll."""
        return len(self._sessions) + self._other_sessions

    @property
    def free_tokens(self) -> int:
        """KV tokens that no session holds or has reserved; negative where answers may need more than there is."""
        return self._free_tokens - self._reserved_tokens

    @property
    def share(self) -> float:
        """Sessions relative to the KV capacity, which stands for the size of the shard's device."""
        return self.sessions / max(self._capacity_tokens, 1)

    def is_about(self, least_share: float) -> bool:
        """Whether it has hardly more sessions for its size than a replica of the least share."""
        extra = MORE_SESSIONS / max(self._capacity_tokens, 1)
        return self.share <= MORE_SHARE * least_share + extra

    def add(self, session: KvHolder) -> None:
        self._sessions.add(session)
        self._reserved_tokens += session.reserved_tokens

    def remove(self, session: KvHolder) -> None:
        """Frees what the session has reserved; no effect on one that is not here."""
        if session in self._sessions:
            self._sessions.remove(session)
            self._reserved_tokens -= session.reserved_tokens

    def placed(self) -> Placed:
        return Placed(len(self._sessions), sum(one.held_tokens for one in self._sessions))

    def reconcile(self, state: shard_pb2.ShardDescribeResponse, placed: Placed) -> None:
        """Takes the shard's own figures; `placed` is what this gateway had there when it asked."""
        self._capacity_tokens = state.identity.kv_capacity_tokens
        self._free_tokens = state.kv_free_tokens + placed.held_tokens
        self._other_sessions = max(0, state.running_sessions + state.waiting_sessions - placed.sessions)
