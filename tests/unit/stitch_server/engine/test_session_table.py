"""What a neighbour may send of a session, and what is freed when it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.sampling import Sampling
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.session_table import Opening, ReceivedSegment, Refused, SessionTable
from stitch_server.engine.types import LayerRange
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from tests.support.engine_fakes import FakeDownstream, FakeUpstream

CUTS = {"weak": LayerRange(2, 8), "strong": LayerRange(4, 8)}
PROMPT = tuple(range(2 * BLOCK_TOKENS + 1))
OPENING = Opening("weak", (), Sampling(), PROMPT, len(PROMPT), 0)
FIRST = ReceivedSegment(session=5, epoch=0, position=0, length=20, wants_token=False, opening=OPENING)
NEXT = replace(FIRST, position=20, length=13, wants_token=True, opening=None)

GONE = Refused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, "it is gone")


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream()


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8)


@pytest.fixture
def intake(pool: BlockPool) -> SessionTable:
    return SessionTable(pool, CUTS, forwarding=None)


def refusal(
    intake: SessionTable, upstream: FakeUpstream, segment: ReceivedSegment, closed: bool = False
) -> tuple[str, str]:
    """The cause's name and the message."""
    with pytest.raises(Refused) as caught:
        intake.accept(upstream, segment, closed)
    return shard_pb2.FailureCause.Name(caught.value.cause).removeprefix("FAILURE_CAUSE_"), str(caught.value)


def test_a_session_is_opened_and_continued(intake: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
    sequence = intake.accept(upstream, FIRST)
    assert (sequence.route, sequence.token_ids, sequence.cached) == ("weak", list(PROMPT), 20)
    assert len(pool.blocks_of(sequence.id)) == 2
    assert intake.accept(upstream, NEXT) is sequence
    assert (sequence.cached, len(pool.blocks_of(sequence.id)), len(intake)) == (33, 3, 1)
    assert intake.layers(sequence) == CUTS["weak"]


def test_links_number_their_sessions_for_themselves(intake: SessionTable, upstream: FakeUpstream) -> None:
    assert intake.accept(upstream, FIRST) is not intake.accept(FakeUpstream(), FIRST)
    assert len(intake) == 2


def test_a_session_that_nobody_opened_is_refused(intake: SessionTable, upstream: FakeUpstream) -> None:
    assert refusal(intake, upstream, NEXT) == ("PRECONDITION", "session 5 is not open here")


@pytest.mark.parametrize(("epoch", "position"), [(0, 19), (0, 21), (0, 0), (1, 20)])
def test_a_segment_out_of_step_is_refused(
    intake: SessionTable, upstream: FakeUpstream, pool: BlockPool, epoch: int, position: int
) -> None:
    intake.accept(upstream, FIRST)
    cause, message = refusal(intake, upstream, replace(NEXT, epoch=epoch, position=position))
    assert cause == "PRECONDITION"
    assert f"sends epoch {epoch}, position {position}, but epoch 0, position 20 comes next" in message
    assert (len(intake), pool.free_blocks) == (0, 8)


def test_a_first_segment_begins_at_the_beginning(intake: SessionTable, upstream: FakeUpstream) -> None:
    assert refusal(intake, upstream, replace(FIRST, position=3))[0] == "PRECONDITION"
    assert len(intake) == 0


def test_a_route_that_does_not_pass_is_refused(intake: SessionTable, upstream: FakeUpstream) -> None:
    cause, message = refusal(intake, upstream, replace(FIRST, opening=replace(OPENING, route="medium")))
    assert (cause, message) == ("PRECONDITION", "route medium does not pass this shard, only weak, strong")


def test_a_chain_that_goes_on_behind_the_last_shard_is_refused(intake: SessionTable, upstream: FakeUpstream) -> None:
    cause, message = refusal(intake, upstream, replace(FIRST, opening=replace(OPENING, chain=("a:1",))))
    assert cause == "PRECONDITION"
    assert message.endswith("1 shards behind this one, which is the last of its chain")


def test_a_chain_that_ends_too_early_is_refused(pool: BlockPool, upstream: FakeUpstream) -> None:
    intake = SessionTable(pool, CUTS, StepsInFlight(FakeDownstream()))
    assert refusal(intake, upstream, FIRST)[1].endswith("which is not the last of its chain")


def test_what_would_fit_if_others_were_not_there_is_told_so(
    intake: SessionTable, upstream: FakeUpstream, pool: BlockPool
) -> None:
    intake.accept(upstream, FIRST)
    intake.accept(upstream, replace(FIRST, session=6))
    assert refusal(intake, upstream, replace(NEXT, length=100)) == ("KV_EXHAUSTED", "no KV block is free for session 5")
    assert (len(intake), pool.free_blocks) == (1, 6)


def test_what_never_fits_is_freed(intake: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
    intake.accept(upstream, FIRST)
    cause, message = refusal(intake, upstream, replace(NEXT, length=200))
    assert (cause, message) == ("TOO_LONG", "session 5 has 220 tokens, but the KV cache holds 128")
    assert (len(intake), pool.free_blocks) == (0, 8)


def test_a_session_may_begin_anew(intake: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
    old = intake.accept(upstream, FIRST)
    new = intake.accept(upstream, replace(FIRST, epoch=1))
    assert new is not old
    assert (new.epoch, len(intake), pool.free_blocks) == (1, 1, 6)


def test_what_was_closed_meanwhile_is_not_opened(intake: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
    assert refusal(intake, upstream, FIRST, closed=True) == ("PRECONDITION", "session 5 is not open here")
    assert pool.free_blocks == 8


class TestReasons:
    """Steps of a session that ended here are on their way already: they must not hear another reason."""

    def ended(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        intake.accept(upstream, FIRST)
        assert refusal(intake, upstream, replace(NEXT, length=200))[0] == "TOO_LONG"

    def test_a_later_step_hears_the_same(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        self.ended(intake, upstream)
        for position in (220, 240):
            cause, message = refusal(intake, upstream, replace(NEXT, position=position))
            assert (cause, message) == ("TOO_LONG", "session 5 has 220 tokens, but the KV cache holds 128")

    def test_also_where_it_was_never_open(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        missing = replace(FIRST, position=16, opening=replace(OPENING, reused_tokens=16))
        assert refusal(intake, upstream, missing)[0] == "PREFIX_MISSING"
        assert refusal(intake, upstream, NEXT)[0] == "PREFIX_MISSING"

    def test_also_where_it_ended_behind(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        intake.accept(upstream, FIRST)
        intake.end(upstream, 5, 0, GONE)
        assert refusal(intake, upstream, NEXT) == ("UNAVAILABLE", "it is gone")

    def test_until_it_is_closed(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        self.ended(intake, upstream)
        intake.remove(upstream, 5)
        assert refusal(intake, upstream, NEXT)[1] == "session 5 is not open here"

    def test_or_begins_anew(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        self.ended(intake, upstream)
        intake.accept(upstream, replace(FIRST, epoch=1))
        intake.accept(upstream, replace(NEXT, epoch=1))

    def test_or_its_link_ends(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        self.ended(intake, upstream)
        intake.remove_all(upstream)
        assert refusal(intake, upstream, NEXT)[1] == "session 5 is not open here"

    def test_another_epoch_hears_nothing_of_it(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        self.ended(intake, upstream)
        assert refusal(intake, upstream, replace(NEXT, epoch=1))[1] == "session 5 is not open here"

    def test_nothing_is_kept_of_a_session_that_was_closed(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        intake.accept(upstream, FIRST)
        intake.remove(upstream, 5)
        intake.end(upstream, 5, 0, GONE)
        refusal(intake, upstream, FIRST, closed=True)
        assert not any(intake._ended.values())


class TestReuse:
    def reusing(self, tokens: int) -> ReceivedSegment:
        opening = replace(OPENING, reused_tokens=tokens)
        return replace(FIRST, session=6, position=tokens, length=1, opening=opening)

    def test_a_known_beginning_is_shared(self, intake: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
        first = intake.accept(upstream, replace(FIRST, length=33))
        pool.publish(first.id, 33)
        second = intake.accept(upstream, self.reusing(32))
        assert (second.cached, second.reused) == (33, 32)
        assert pool.blocks_of(second.id)[:2] == pool.blocks_of(first.id)[:2]
        assert pool.free_blocks == 8 - 4

    def test_an_unknown_one_is_missing(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        cause, message = refusal(intake, upstream, self.reusing(32))
        assert (cause, message) == ("PREFIX_MISSING", "the first 32 tokens of session 6 are not here")
        assert len(intake) == 0

    def test_no_more_than_the_prompt_can_be_shared(
        self, intake: SessionTable, upstream: FakeUpstream, pool: BlockPool
    ) -> None:
        pool.publish(intake.accept(upstream, replace(FIRST, length=33)).id, 33)
        assert refusal(intake, upstream, self.reusing(48))[0] == "PREFIX_MISSING"

    def test_half_a_block_can_not_be_shared(
        self, intake: SessionTable, upstream: FakeUpstream, pool: BlockPool
    ) -> None:
        pool.publish(intake.accept(upstream, replace(FIRST, length=33)).id, 33)
        cause, message = refusal(intake, upstream, self.reusing(17))
        assert (cause, message) == ("PRECONDITION", "17 reused tokens are no whole blocks of 16")


class TestEnds:
    """What is freed here is freed behind, whatever the reason."""

    @pytest.fixture
    def downstream(self) -> FakeDownstream:
        return FakeDownstream()

    @pytest.fixture
    def intake(self, pool: BlockPool, downstream: FakeDownstream) -> SessionTable:
        return SessionTable(pool, CUTS, StepsInFlight(downstream))

    def opened(self, intake: SessionTable, upstream: FakeUpstream, session: int = 5, epoch: int = 0) -> int:
        """A session that the shard behind knows; its number there."""
        opening = replace(OPENING, chain=("end:1",))
        sequence = intake.accept(upstream, replace(FIRST, session=session, epoch=epoch, opening=opening))
        sequence.open_downstream = True
        return sequence.id

    def test_closed(
        self, intake: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream, pool: BlockPool
    ) -> None:
        number = self.opened(intake, upstream)
        intake.remove(upstream, 5)
        intake.remove(upstream, 5)
        assert (downstream.closed, pool.free_blocks, len(intake)) == ([("end:1", number)], 8, 0)

    def test_unknown_behind(self, intake: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream) -> None:
        intake.accept(upstream, replace(FIRST, opening=replace(OPENING, chain=("end:1",))))
        intake.remove(upstream, 5)
        assert downstream.closed == []

    def test_with_its_link(
        self, intake: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream, pool: BlockPool
    ) -> None:
        numbers = [self.opened(intake, upstream, session) for session in (5, 6)]
        other = FakeUpstream()
        self.opened(intake, other)
        intake.remove_all(upstream)
        assert downstream.closed == [("end:1", number) for number in numbers]
        assert (len(intake), pool.free_blocks) == (1, 6)

    def test_out_of_step(self, intake: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream) -> None:
        number = self.opened(intake, upstream)
        refusal(intake, upstream, replace(NEXT, position=3))
        assert downstream.closed == [("end:1", number)]

    def test_without_room(self, intake: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream) -> None:
        number = self.opened(intake, upstream)
        refusal(intake, upstream, replace(NEXT, length=200))
        assert downstream.closed == [("end:1", number)]

    def test_begun_anew(self, intake: SessionTable, upstream: FakeUpstream, downstream: FakeDownstream) -> None:
        number = self.opened(intake, upstream)
        self.opened(intake, upstream, epoch=1)
        assert downstream.closed == [("end:1", number)]

    def test_an_earlier_epoch_ends_nothing(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        self.opened(intake, upstream, epoch=1)
        intake.end(upstream, 5, 0, GONE)
        intake.end(upstream, 6, 1, GONE)
        assert len(intake) == 1
        intake.end(upstream, 5, 1, GONE)
        assert len(intake) == 0

    def test_with_the_shard_behind(self, intake: SessionTable, upstream: FakeUpstream, pool: BlockPool) -> None:
        self.opened(intake, upstream)
        intake.lose("other:1", "other:1 is gone")
        intake.accept(upstream, replace(NEXT, length=1))
        intake.lose("end:1", "end:1 is gone")
        assert refusal(intake, upstream, replace(NEXT, position=21, length=1)) == ("UNAVAILABLE", "end:1 is gone")
        assert pool.free_blocks == 8

    def test_a_lost_session_may_begin_anew(self, intake: SessionTable, upstream: FakeUpstream) -> None:
        self.opened(intake, upstream)
        intake.lose("end:1", "end:1 is gone")
        self.opened(intake, upstream, epoch=1)
        intake.accept(upstream, replace(NEXT, epoch=1, length=1))
