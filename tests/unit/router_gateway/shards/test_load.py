"""Tests of a replica's load: reservations, the shard's own figures, and both together."""

from __future__ import annotations

from dataclasses import dataclass

from router_gateway.shards.load import ReplicaLoad
from stitch.v1.shard_pb2 import ShardDescribeResponse, ShardIdentity


@dataclass(eq=False)
class Holder:
    reserved_tokens: int
    held_tokens: int = 0


def state(free: int, running: int = 0, waiting: int = 0) -> ShardDescribeResponse:
    identity = ShardIdentity(kv_capacity_tokens=1_000)
    return ShardDescribeResponse(
        identity=identity, kv_free_tokens=free, running_sessions=running, waiting_sessions=waiting
    )


def polled(load: ReplicaLoad, answer: ShardDescribeResponse) -> None:
    load.reconcile(answer, load.placed())


def test_session_reserves_kv_until_it_is_removed() -> None:
    load, session = ReplicaLoad(), Holder(300)
    polled(load, state(1_000))
    load.add(session)
    assert (load.free_tokens, load.sessions) == (700, 1)
    load.remove(session)
    load.remove(session)
    assert (load.free_tokens, load.sessions) == (1_000, 0)


def test_kv_that_a_session_holds_counts_once() -> None:
    load, session = ReplicaLoad(), Holder(300)
    polled(load, state(1_000))
    load.add(session)
    session.held_tokens = 120
    polled(load, state(880, running=1))
    assert (load.free_tokens, load.sessions) == (700, 1)


def test_kv_and_sessions_of_other_gateways_count() -> None:
    load, session = ReplicaLoad(), Holder(300, held_tokens=100)
    load.add(session)
    polled(load, state(500, running=3, waiting=2))
    assert (load.free_tokens, load.sessions) == (300, 5)


def test_session_that_ends_during_a_poll_is_no_foreign_one() -> None:
    load, session = ReplicaLoad(), Holder(300, held_tokens=100)
    load.add(session)
    placed = load.placed()
    load.remove(session)
    load.reconcile(state(900, running=1), placed)
    assert (load.free_tokens, load.sessions) == (1_000, 0)


def test_share_relates_sessions_to_the_capacity() -> None:
    small, large = ReplicaLoad(), ReplicaLoad()
    polled(small, state(1_000))
    large.reconcile(ShardDescribeResponse(identity=ShardIdentity(kv_capacity_tokens=4_000)), large.placed())
    small.add(Holder(10))
    for _ in range(3):
        large.add(Holder(10))
    assert large.share < small.share
