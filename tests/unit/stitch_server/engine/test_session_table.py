"""The sessions of upstream links: which segments are accepted, and what is freed when a session ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from stitch.errors import InvalidRequest
from stitch.sampling import Sampling
from stitch.v1 import shard_pb2
from stitch_server.engine import session_table
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.session_table import OpeningLimits, SessionTable
from stitch_server.engine.types import IncomingSegment, LayerRange, Session, SessionRefused
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from tests.support.engine_fakes import FakeDownstream, FakeUpstream, any_chain, without_states

LAYER_RANGES = {"weak": LayerRange(2, 8), "strong": LayerRange(4, 8)}
PROMPT = tuple(range(2 * BLOCK_TOKENS + 1))
NEXT = IncomingSegment(session_id=5, epoch=0, position=20, length=13, wants_token=True)


def first(
    session_id: int = 5,
    *,
    epoch: int = 0,
    position: int | None = None,
    length: int = 20,
    route: str = "weak",
    chain: tuple[str, ...] = (),
    reused: int = 0,
    tenant: str = "",
) -> IncomingSegment:
    """A segment that opens a session of PROMPT."""
    opened = Session(route, chain, Sampling(), list(PROMPT), len(PROMPT), tenant, epoch=epoch, reused=reused)
    opened.cached = reused
    return IncomingSegment(session_id, epoch, reused if position is None else position, length, False, opened)


GONE = SessionRefused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, "it is gone")


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream()


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8)


@pytest.fixture
def table(pool: BlockPool) -> SessionTable:
    return SessionTable(without_states(pool), LAYER_RANGES, None, any_chain, OpeningLimits())


def refusal(
    table: SessionTable, upstream: FakeUpstream, segment: IncomingSegment, closed: bool = False
) -> tuple[str, str]:
    """The cause's name and the message."""
    with pytest.raises(SessionRefused) as caught:
        table.accept(upstream, segment, closed)
    return shard_pb2.FailureCause.Name(caught.value.cause).removeprefix("FAILURE_CAUSE_"), str(caught.value)


def test_first_segment_opens_session_and_next_one_extends_it(
    table: SessionTable, upstream: FakeUpstream, pool: BlockPool
) -> None:
    session = table.accept(upstream, first())
    assert (session.route, session.token_ids, session.cached) == ("weak", list(PROMPT), 20)
    assert len(pool.blocks_of(session.id)) == 2
    assert table.accept(upstream, NEXT) is session
    assert (session.cached, len(pool.blocks_of(session.id)), len(table)) == (33, 3, 1)
    assert table.layers_of(session) == LAYER_RANGES["weak"]


def test_session_ids_of_two_links_are_independent(table: SessionTable, upstream: FakeUpstream) -> None:
    assert table.accept(upstream, first()) is not table.accept(FakeUpstream(), first())
    assert len(table) == 2


def test_segment_of_unknown_session_is_refused(table: SessionTable, upstream: FakeUpstream) -> None:
    assert refusal(table, upstream, NEXT) == ("PRECONDITION", "session 5 is not open here")


@pytest.mark.parametrize(("epoch", "position"), [(0, 19), (0, 21), (0, 0), (1, 20)])
def test_segment_at_wrong_epoch_or_position_is_refused_and_frees_session(
    table: SessionTable, upstream: FakeUpstream, pool: BlockPool, epoch: int, position: int
) -> None:
    table.accept(upstream, first())
    cause, message = refusal(table, upstream, replace(NEXT, epoch=epoch, position=position))
    assert cause == "PRECONDITION"
    assert f"sends epoch {epoch}, position {position}, but epoch 0, position 20 comes next" in message
    assert (len(table), pool.free_blocks) == (0, 8)


def test_first_segment_at_wrong_position_is_refused(table: SessionTable, upstream: FakeUpstream) -> None:
    assert refusal(table, upstream, first(position=3))[0] == "PRECONDITION"
    assert len(table) == 0


def test_route_that_does_not_pass_shard_is_refused(table: SessionTable, upstream: FakeUpstream) -> None:
    cause, message = refusal(table, upstream, first(route="medium"))
    assert (cause, message) == ("PRECONDITION", "route medium does not pass this shard, only weak, strong")


def test_chain_of_another_route_is_refused(pool: BlockPool, upstream: FakeUpstream) -> None:
    def check_chain(route: str, chain: Sequence[str]) -> None:
        raise InvalidRequest("chain", [*chain], f"route {route} ends here")

    table = SessionTable(without_states(pool), LAYER_RANGES, None, check_chain, OpeningLimits())
    expected = "chain is ['a'], but route weak ends here"
    assert refusal(table, upstream, first(chain=("a",))) == ("PRECONDITION", expected)
    assert (len(table), pool.free_blocks) == (0, 8)


def test_youngest_session_without_free_block_is_refused_as_kv_exhausted(
    table: SessionTable, upstream: FakeUpstream, pool: BlockPool
) -> None:
    table.accept(upstream, first())
    table.accept(upstream, first(6))
    cause, message = refusal(table, upstream, replace(NEXT, session_id=6, length=100))
    assert (cause, message) == ("KV_EXHAUSTED", "no KV block is free for session 6, the youngest")
    assert (len(table), pool.free_blocks) == (1, 6)


def test_older_session_without_free_block_preempts_the_youngest_of_any_link(
    table: SessionTable, upstream: FakeUpstream
) -> None:
    other = FakeUpstream()
    older = table.accept(upstream, first())
    table.accept(other, first(6))
    assert table.accept(upstream, replace(NEXT, length=100)) is older
    ((link, session_id, reason),) = table.take_preempted()
    assert (link, session_id, reason.cause) == (other, 6, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
    assert refusal(table, other, replace(NEXT, session_id=6))[0] == "KV_EXHAUSTED"


class TestRoom:
    """A session is opened where its expected tokens have room, or not at all."""

    def expecting(self, tokens: int, session_id: int = 5) -> IncomingSegment:
        segment = first(session_id)
        assert segment.new_session is not None
        segment.new_session.expected_tokens = tokens
        return segment

    def test_session_without_room_is_refused_before_its_first_segment(
        self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool
    ) -> None:
        table.accept(upstream, self.expecting(80))
        cause, message = refusal(table, upstream, self.expecting(49, 6))
        assert (cause, len(table), pool.room_tokens) == ("KV_EXHAUSTED", 1, 48)
        assert message == "session 6 is expected to have 49 tokens, for which there is no KV room"
        table.accept(upstream, self.expecting(48, 7))

    def test_prompt_longer_than_kv_cache_is_refused_as_too_long(
        self, table: SessionTable, upstream: FakeUpstream
    ) -> None:
        segment = self.expecting(0)
        assert segment.new_session is not None
        segment.new_session.token_ids += range(100)
        assert refusal(table, upstream, segment)[0] == "TOO_LONG"

    def test_expectation_beyond_kv_cache_takes_all_of_it(
        self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool
    ) -> None:
        table.accept(upstream, self.expecting(10_000))
        assert pool.room_tokens == 0


def test_segment_larger_than_kv_cache_is_refused_as_too_long(
    table: SessionTable, upstream: FakeUpstream, pool: BlockPool
) -> None:
    table.accept(upstream, first())
    cause, message = refusal(table, upstream, replace(NEXT, length=200))
    assert (cause, message) == ("TOO_LONG", "session 5 has 220 tokens, but the KV cache holds 128")
    assert (len(table), pool.free_blocks) == (0, 8)


def test_later_epoch_replaces_session(table: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
    old = table.accept(upstream, first())
    new = table.accept(upstream, first(epoch=1))
    assert new is not old
    assert (new.epoch, len(table), pool.free_blocks) == (1, 1, 6)


def test_first_segment_of_closed_session_does_not_open_it(
    table: SessionTable, upstream: FakeUpstream, pool: BlockPool
) -> None:
    assert refusal(table, upstream, first(), closed=True) == ("PRECONDITION", "session 5 is not open here")
    assert pool.free_blocks == 8


class TestTombstones:
    """Steps of a failed session may be in flight: they are refused with the session's first reason."""

    def fail_one(self, table: SessionTable, upstream: FakeUpstream) -> None:
        table.accept(upstream, first())
        assert refusal(table, upstream, replace(NEXT, length=200))[0] == "TOO_LONG"

    def test_later_segments_are_refused_with_first_reason(self, table: SessionTable, upstream: FakeUpstream) -> None:
        self.fail_one(table, upstream)
        for position in (220, 240):
            cause, message = refusal(table, upstream, replace(NEXT, position=position))
            assert (cause, message) == ("TOO_LONG", "session 5 has 220 tokens, but the KV cache holds 128")

    def test_refused_first_segment_leaves_tombstone(self, table: SessionTable, upstream: FakeUpstream) -> None:
        missing = first(reused=16)
        assert refusal(table, upstream, missing)[0] == "PREFIX_MISSING"
        assert refusal(table, upstream, NEXT)[0] == "PREFIX_MISSING"

    def test_failure_downstream_leaves_tombstone(self, table: SessionTable, upstream: FakeUpstream) -> None:
        table.accept(upstream, first())
        table.fail(upstream, 5, 0, GONE)
        assert refusal(table, upstream, NEXT) == ("UNAVAILABLE", "it is gone")

    def test_close_removes_tombstone(self, table: SessionTable, upstream: FakeUpstream) -> None:
        self.fail_one(table, upstream)
        table.close(upstream, 5)
        assert refusal(table, upstream, NEXT)[1] == "session 5 is not open here"

    def test_later_epoch_replaces_tombstone(self, table: SessionTable, upstream: FakeUpstream) -> None:
        self.fail_one(table, upstream)
        table.accept(upstream, first(epoch=1))
        table.accept(upstream, replace(NEXT, epoch=1))

    def test_end_of_link_removes_tombstones(self, table: SessionTable, upstream: FakeUpstream) -> None:
        self.fail_one(table, upstream)
        table.close_all(upstream)
        assert refusal(table, upstream, NEXT)[1] == "session 5 is not open here"

    def test_tombstone_applies_to_its_epoch_alone(self, table: SessionTable, upstream: FakeUpstream) -> None:
        self.fail_one(table, upstream)
        assert refusal(table, upstream, replace(NEXT, epoch=1))[1] == "session 5 is not open here"

    def test_closed_session_leaves_no_tombstone(self, table: SessionTable, upstream: FakeUpstream) -> None:
        table.accept(upstream, first())
        table.close(upstream, 5)
        table.fail(upstream, 5, 0, GONE)
        refusal(table, upstream, first(), closed=True)
        assert not any(table._tombstones.values())


class TestPrefixCache:
    def reusing(self, tokens: int) -> IncomingSegment:
        return first(6, reused=tokens, length=1)

    def test_cached_prefix_is_shared(self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
        one = table.accept(upstream, first(length=33))
        pool.publish(one.id, 33)
        second = table.accept(upstream, self.reusing(32))
        assert (second.cached, second.reused) == (33, 32)
        assert pool.blocks_of(second.id)[:2] == pool.blocks_of(one.id)[:2]
        assert pool.free_blocks == 8 - 4

    def test_prefix_that_is_not_cached_is_missing(self, table: SessionTable, upstream: FakeUpstream) -> None:
        cause, message = refusal(table, upstream, self.reusing(32))
        assert (cause, message) == ("PREFIX_MISSING", "the first 32 tokens of session 6 are not cached")
        assert len(table) == 0

    def test_prefix_of_another_tenant_is_missing(
        self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool
    ) -> None:
        pool.publish(table.accept(upstream, first(length=33)).id, 33)
        assert refusal(table, upstream, first(6, reused=32, length=1, tenant="other"))[0] == "PREFIX_MISSING"

    def test_reuse_beyond_prompt_is_missing(self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
        pool.publish(table.accept(upstream, first(length=33)).id, 33)
        assert refusal(table, upstream, self.reusing(48))[0] == "PREFIX_MISSING"

    def test_reuse_of_partial_block_is_refused(
        self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool
    ) -> None:
        pool.publish(table.accept(upstream, first(length=33)).id, 33)
        cause, message = refusal(table, upstream, self.reusing(17))
        assert (cause, message) == ("PRECONDITION", "17 reused tokens are no whole blocks of 16")


class TestClosingDownstream:
    """A session that is freed here is closed on the next shard, for whatever reason."""

    @pytest.fixture
    def downstream(self) -> FakeDownstream:
        return FakeDownstream()

    @pytest.fixture
    def table(self, pool: BlockPool, downstream: FakeDownstream) -> SessionTable:
        return SessionTable(without_states(pool), LAYER_RANGES, StepsInFlight(downstream), any_chain, OpeningLimits())

    def open_one(self, table: SessionTable, upstream: FakeUpstream, session_id: int = 5, epoch: int = 0) -> int:
        """A session that is open on the next shard; returns its id there."""
        accepted = table.accept(upstream, first(session_id, epoch=epoch, chain=("end",)))
        accepted.open_downstream = True
        return accepted.id

    def test_closed_session_is_closed_downstream_once(
        self, table: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream, pool: BlockPool
    ) -> None:
        number = self.open_one(table, upstream)
        table.close(upstream, 5)
        table.close(upstream, 5)
        assert (downstream.closed, pool.free_blocks, len(table)) == ([("end", number)], 8, 0)

    def test_session_unknown_downstream_is_not_closed_there(
        self, table: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream
    ) -> None:
        table.accept(upstream, first(chain=("end",)))
        table.close(upstream, 5)
        assert downstream.closed == []

    def test_end_of_link_closes_its_sessions_downstream(
        self, table: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream, pool: BlockPool
    ) -> None:
        number = self.open_one(table, upstream)
        other = FakeUpstream()
        self.open_one(table, other)
        table.close_all(upstream)
        assert downstream.closed == [("end", number)]
        assert (len(table), pool.free_blocks) == (1, 6)

    def test_session_refused_for_position_is_closed_downstream(
        self, table: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream
    ) -> None:
        number = self.open_one(table, upstream)
        refusal(table, upstream, replace(NEXT, position=3))
        assert downstream.closed == [("end", number)]

    def test_session_refused_for_size_is_closed_downstream(
        self, table: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream
    ) -> None:
        number = self.open_one(table, upstream)
        refusal(table, upstream, replace(NEXT, length=200))
        assert downstream.closed == [("end", number)]

    def test_replaced_epoch_is_closed_downstream(
        self, table: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream
    ) -> None:
        number = self.open_one(table, upstream)
        self.open_one(table, upstream, epoch=1)
        assert downstream.closed == [("end", number)]

    def test_failure_of_earlier_epoch_has_no_effect(self, table: SessionTable, upstream: FakeUpstream) -> None:
        self.open_one(table, upstream, epoch=1)
        table.fail(upstream, 5, 0, GONE)
        table.fail(upstream, 6, 1, GONE)
        assert len(table) == 1
        table.fail(upstream, 5, 1, GONE)
        assert len(table) == 0

    def test_lost_next_shard_fails_its_sessions_alone(
        self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool
    ) -> None:
        self.open_one(table, upstream)
        table.fail_downstream_of("other", "other is gone")
        table.accept(upstream, replace(NEXT, length=1))
        table.fail_downstream_of("end", "end is gone")
        assert refusal(table, upstream, replace(NEXT, position=21, length=1)) == ("UNAVAILABLE", "end is gone")
        assert pool.free_blocks == 8

    def test_session_lost_downstream_may_reopen_in_later_epoch(
        self, table: SessionTable, upstream: FakeUpstream
    ) -> None:
        self.open_one(table, upstream)
        table.fail_downstream_of("end", "end is gone")
        self.open_one(table, upstream, epoch=1)
        table.accept(upstream, replace(NEXT, epoch=1, length=1))


class TestDraining:
    """A draining shard finishes its sessions and refuses new ones."""

    def test_new_session_is_refused_as_draining(self, table: SessionTable, upstream: FakeUpstream) -> None:
        table.is_draining = True
        assert refusal(table, upstream, first())[0] == "DRAINING"
        assert refusal(table, upstream, NEXT)[0] == "DRAINING"
        assert len(table) == 0

    def test_open_session_continues(self, table: SessionTable, upstream: FakeUpstream) -> None:
        session = table.accept(upstream, first())
        table.is_draining = True
        assert refusal(table, upstream, first(6))[0] == "DRAINING"
        assert table.accept(upstream, NEXT) is session


def test_forced_token_beyond_the_head_is_refused(pool: BlockPool, upstream: FakeUpstream) -> None:
    table = SessionTable(without_states(pool), LAYER_RANGES, None, any_chain, OpeningLimits(logits=300))
    segment = first()
    assert segment.new_session is not None
    segment.new_session.sampling = Sampling(forced_token_ids=(299, 300))
    assert refusal(table, upstream, segment) == (
        "PRECONDITION",
        "token 300 is forced or biased, but the head has 300 logits",
    )
    segment.new_session.sampling = Sampling(logit_bias=((2, 1.0), (300, 1.0)))
    assert refusal(table, upstream, segment) == (
        "PRECONDITION",
        "token 300 is forced or biased, but the head has 300 logits",
    )
    segment.new_session.sampling = Sampling(forced_token_ids=(299,))
    assert table.accept(upstream, segment).sampling.forced_token_ids == (299,)


def test_route_that_does_not_come_over_the_link_is_refused(table: SessionTable) -> None:
    upstream = FakeUpstream(routes=frozenset({"strong"}))
    expected = "route weak does not come over this link, only ['strong']"
    assert refusal(table, upstream, first()) == ("PRECONDITION", expected)


class TestOpenings:
    """What an opening claims is within the limits of this shard, or its session fails alone."""

    LIMITS = OpeningLimits(context_length=64, vocabulary_size=100, logits=90)

    @pytest.fixture
    def table(self, pool: BlockPool) -> SessionTable:
        return SessionTable(without_states(pool), LAYER_RANGES, None, any_chain, self.LIMITS)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"token_ids": []}, "a session opens with 0 tokens, but the context holds 64"),
            ({"token_ids": [1] * 65}, "a session opens with 65 tokens, but the context holds 64"),
            (
                {"token_ids": [1, 1 << 27], "prompt_tokens": 2},
                "token 134217728 opens a session, but tokens are below",
            ),
            ({"prompt_tokens": 0}, "a session opens with a prompt of 0 of 33 tokens"),
            ({"prompt_tokens": 34}, "a session opens with a prompt of 34 of 33 tokens"),
            (
                {"sampling": Sampling(forced_token_ids=(90,))},
                "token 90 is forced or biased, but the head has 90 logits",
            ),
            ({"sampling": Sampling(forced_token_ids=(1,) * 65)}, "with 65 forced and 0 stop tokens, but 64 and 2048"),
            (
                {"sampling": Sampling(stop_token_ids=(1,) * 2_049)},
                "0 forced and 2049 stop tokens, but 64 and 2048",
            ),
            ({"tenant": "x" * 257}, "the tenant has 257 characters, but at most 256"),
        ],
    )
    def test_claim_outside_of_its_limit_fails_the_session(
        self, table: SessionTable, upstream: FakeUpstream, pool: BlockPool, changes: dict[str, Any], message: str
    ) -> None:
        segment = first()
        assert segment.new_session is not None
        for name, value in changes.items():
            setattr(segment.new_session, name, value)
        cause, said = refusal(table, upstream, segment)
        assert cause == "PRECONDITION"
        assert message in said
        assert (len(table), pool.free_blocks) == (0, 8)

    def test_session_beyond_the_context_fails(self, table: SessionTable, upstream: FakeUpstream) -> None:
        table.accept(upstream, first())
        expected = ("PRECONDITION", "session 5 has 65 tokens, but the context holds 64")
        assert refusal(table, upstream, replace(NEXT, length=45)) == expected

    def test_token_ids_of_a_link_are_bounded_by_the_kv_cache(
        self, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session_table, "MAX_IDS_PER_KV_TOKEN", 1)
        table = SessionTable(without_states(BlockPool(4)), LAYER_RANGES, None, any_chain, OpeningLimits())
        other = FakeUpstream()
        table.accept(upstream, first())
        cause, said = refusal(table, upstream, first(6))
        assert cause == "KV_EXHAUSTED"
        assert said == "the sessions of this link hold 33 token ids, and 64 is the limit"
        assert (
            refusal(table, other, first(6))[1]
            == "session 6 is expected to have 33 tokens, for which there is no KV room"
        )

    def test_route_in_a_refusal_is_plain(self, table: SessionTable, upstream: FakeUpstream) -> None:
        _, said = refusal(table, upstream, first(route="x\n" * 1_000))
        assert said.isprintable()
        assert len(said) < 700


class TestPrefixScopes:
    """KV that was computed from one link's hidden states is found by sessions of the same upstream shard alone."""

    def leave(self, table: SessionTable, pool: BlockPool, upstream: FakeUpstream, tenant: str = "") -> Session:
        """Leaves the prompt's KV in the prefix cache, and closes the session."""
        segment = first(length=33)
        assert segment.new_session is not None
        segment.new_session.tenant = tenant
        session = table.accept(upstream, segment)
        pool.publish(session.id, 33)
        table.close(upstream, 5)
        return session

    def finds(self, table: SessionTable, upstream: FakeUpstream, tenant: str = "") -> bool:
        """Whether a session of the same prompt finds two blocks."""
        segment = first(6, reused=32, length=1)
        assert segment.new_session is not None
        segment.new_session.tenant = tenant
        try:
            table.accept(upstream, segment)
        except SessionRefused as refused:
            return refused.cause != shard_pb2.FAILURE_CAUSE_PREFIX_MISSING
        return True

    def test_link_of_another_scope_finds_nothing(self, table: SessionTable, pool: BlockPool) -> None:
        self.leave(table, pool, FakeUpstream(prefix_scope="stranger"))
        assert not self.finds(table, FakeUpstream(prefix_scope="bottom-0"))
        assert self.finds(table, FakeUpstream(prefix_scope="stranger"))

    def test_scope_holds_across_links_and_tenants_stay_apart(self, table: SessionTable, pool: BlockPool) -> None:
        self.leave(table, pool, FakeUpstream(), tenant="acme")
        assert self.finds(table, FakeUpstream(), tenant="acme")
        assert not self.finds(table, FakeUpstream(), tenant="other")

    def test_next_shards_get_the_scope_with_the_tenant(self, table: SessionTable, pool: BlockPool) -> None:
        scopes = [("a", "acme"), ("b", "acme"), ("a", "other"), ("a\0acme", ""), ("a", "")]
        sent = {self.leave(table, pool, FakeUpstream(prefix_scope=one), tenant).tenant for one, tenant in scopes}
        assert len(sent) == len(scopes)


@pytest.mark.parametrize(("chain", "granted"), [(("top-1",), [16]), ((), []), (("top-1", "top-2"), [])])
def test_wish_for_room_counts_on_a_chain_of_the_links_routes_alone(
    pool: BlockPool, upstream: FakeUpstream, chain: tuple[str, ...], granted: list[int]
) -> None:
    def check_chain(route: str, chain: Sequence[str]) -> None:
        if chain != ("top-1",):
            raise InvalidRequest("chain", list(chain), "route weak passes top-1")

    in_flight = StepsInFlight(FakeDownstream())
    table = SessionTable(without_states(pool), LAYER_RANGES, in_flight, check_chain, OpeningLimits())
    table.want(upstream, 16, chain)
    table.grants.give()
    assert upstream.granted == granted
