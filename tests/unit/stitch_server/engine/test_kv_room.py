"""Credit of the sender and grants of the receiver: who may open a session, and who is asked or told."""

from __future__ import annotations

import pytest

from stitch_server.engine.kv_room import GRANT_SECONDS, INITIAL_ROOM_TOKENS, KvCredit, KvGrants
from stitch_server.engine.types import LayerRange, Segment
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import FakeDownstream, FakeUpstream, ManualClock, new_request

CHAIN = ("middle-0", "top-0")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


class TestCredit:
    @pytest.fixture
    def links(self) -> FakeDownstream:
        return FakeDownstream()

    @pytest.fixture
    def credit(self, links: FakeDownstream) -> KvCredit:
        return KvCredit(links)

    def opened(self, credit: KvCredit, tokens: int) -> Segment:
        """The first segment of a session that is opened."""
        request = new_request(chain=CHAIN)
        request.expected_tokens = tokens
        credit.open(request)
        return Segment(request, LayerRange(0, 1), 0, 20, wants_token=True, blocks=[])

    def test_first_session_may_be_of_any_length(self, credit: KvCredit, links: FakeDownstream) -> None:
        assert credit.has_room(CHAIN, 10 * INITIAL_ROOM_TOKENS)
        self.opened(credit, 10 * INITIAL_ROOM_TOKENS)
        assert not credit.has_room(CHAIN, 20)

    def test_sessions_count_until_a_report_counts_them(self, credit: KvCredit) -> None:
        credit.report("middle-0", 100, [])
        segment = self.opened(credit, 60)
        assert credit.free_tokens("middle-0") == 40
        credit.report("middle-0", 90, [])
        assert credit.free_tokens("middle-0") == 30
        credit.report("middle-0", 40, [segment])
        assert credit.free_tokens("middle-0") == 40

    def test_session_that_ended_counts_no_longer(self, credit: KvCredit) -> None:
        credit.report("middle-0", 100, [])
        credit.close(self.opened(credit, 60).session)
        assert credit.free_tokens("middle-0") == 100

    def test_full_shard_is_asked_once(self, credit: KvCredit, links: FakeDownstream) -> None:
        credit.report("middle-0", 10, [])
        assert not any(credit.has_room(CHAIN, 20) for _ in range(3))
        assert links.wanted == [("middle-0", 20, ("top-0",))]
        assert credit.wanting == ["middle-0"]

    def test_grant_admits_the_session_that_asked(self, credit: KvCredit) -> None:
        credit.report("middle-0", 10, [])
        self.opened(credit, 10)
        credit.has_room(CHAIN, 20)
        credit.grant("middle-0", 20)
        assert credit.has_room(CHAIN, 20)
        assert credit.wanting == []

    def test_wish_is_withdrawn(self, credit: KvCredit, links: FakeDownstream) -> None:
        credit.report("middle-0", 10, [])
        credit.has_room(CHAIN, 20)
        credit.withdraw("middle-0")
        assert (links.wanted[-1], credit.wanting) == (("middle-0", 0, ()), [])

    def test_lost_link_is_forgotten(self, credit: KvCredit) -> None:
        credit.report("middle-0", 0, [])
        credit.forget("middle-0")
        assert credit.has_room(CHAIN, 20)


class TestGrants:
    @pytest.fixture
    def pool(self) -> BlockPool:
        return BlockPool(10)

    @pytest.fixture
    def grants(self, pool: BlockPool, clock: ManualClock) -> KvGrants:
        return KvGrants(pool, None, clock)

    def test_links_are_told_of_all_room_where_none_waits(self, grants: KvGrants, pool: BlockPool) -> None:
        pool.begin(1, [], 0, 50)
        assert grants.room_for(FakeUpstream()) == 160 - 64

    def test_wish_is_granted_once_there_is_room(self, grants: KvGrants, pool: BlockPool) -> None:
        link = FakeUpstream()
        pool.begin(1, [], 0, 100)
        grants.want(link, 60, ())
        grants.give()
        assert (link.granted, grants.room_for(link)) == ([], 0)
        pool.release(1)
        grants.give()
        grants.give()
        assert (link.granted, grants.room_for(link)) == ([60], 60)

    def test_granted_room_is_kept_from_other_links(self, grants: KvGrants) -> None:
        link, other = FakeUpstream(), FakeUpstream()
        grants.want(link, 100, ())
        grants.give()
        assert (grants.fits(other, 64), grants.fits(link, 160)) == (False, True)
        grants.use_grant(link)
        assert grants.fits(other, 64)

    def test_links_take_turns(self, grants: KvGrants, pool: BlockPool) -> None:
        links = [FakeUpstream() for _ in range(3)]
        pool.begin(1, [], 0, 160)
        for link in links:
            grants.want(link, 100, ())
        pool.release(1)
        for link in links:
            grants.give()
            assert [one.granted for one in links].count([100]) == links.index(link) + 1
            grants.use_grant(link)
            grants.want(link, 100, ())
        assert [one.granted for one in links] == [[100], [100], [100]]

    def test_small_wish_does_not_overtake_a_large_one(self, grants: KvGrants, pool: BlockPool) -> None:
        large, small = FakeUpstream(), FakeUpstream()
        pool.begin(1, [], 0, 100)
        grants.want(large, 100, ())
        grants.want(small, 16, ())
        grants.give()
        assert (large.granted, small.granted) == ([], [])

    def test_unused_grant_expires(self, grants: KvGrants, clock: ManualClock) -> None:
        hung, other = FakeUpstream(), FakeUpstream()
        grants.want(hung, 160, ())
        grants.give()
        grants.want(other, 100, ())
        grants.give()
        assert other.granted == []
        clock.advance(GRANT_SECONDS)
        grants.give()
        assert other.granted == [100]

    @pytest.mark.parametrize("ends", ["withdrawn", "link lost"])
    def test_wish_that_ended_holds_up_nobody(self, grants: KvGrants, pool: BlockPool, ends: str) -> None:
        link, other = FakeUpstream(), FakeUpstream()
        pool.begin(1, [], 0, 100)
        grants.want(link, 100, ())
        grants.want(other, 16, ())
        grants.want(link, 0, ()) if ends == "withdrawn" else grants.forget(link)
        grants.give()
        assert other.granted == [16]

    def test_wish_beyond_the_pool_gets_all_of_it(self, grants: KvGrants) -> None:
        link = FakeUpstream()
        grants.want(link, 10_000, ())
        grants.give()
        assert (link.granted, grants.fits(link, 10_000), grants.fits(FakeUpstream(), 1)) == ([10_000], True, False)

    def test_draining_shard_grants_all_wishes(self, grants: KvGrants, pool: BlockPool) -> None:
        links = FakeUpstream(), FakeUpstream()
        pool.begin(1, [], 0, 160)
        for link in links:
            grants.want(link, 100, ())
        grants.give(to_all=True)
        assert [link.granted for link in links] == [[100], [100]]

    def test_middle_shard_grants_what_the_next_one_has_room_for(self, pool: BlockPool, clock: ManualClock) -> None:
        downstream, links = FakeDownstream(), [FakeUpstream() for _ in range(3)]
        credit = KvCredit(downstream)
        grants = KvGrants(pool, credit, clock)
        credit.report("top-0", 10, [])
        for link, chain in zip(links, [("top-0",), ("top-0",), ("top-1",)], strict=True):
            grants.want(link, 20, chain)
        grants.give()
        grants.give()
        assert downstream.wanted == [("top-0", 20, ())]
        assert [link.granted for link in links] == [[], [], [20]]
        credit.grant("top-0", 20)
        grants.give()
        assert links[0].granted == [20]
