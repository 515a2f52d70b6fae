"""Blocks are counted right, shared by content, and forgotten in the order of their last use."""

from __future__ import annotations

import random

import pytest

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool, blocks_for, prefix_hashes

PROMPT = list(range(3 * BLOCK_TOKENS + 1))
HASHES = prefix_hashes("weak", PROMPT)


def published(pool: BlockPool, number: int, prompt: list[int] = PROMPT) -> list[int]:
    """A sequence that computed its whole prompt; its blocks."""
    assert pool.begin(number, prefix_hashes("weak", prompt), 0)
    assert pool.grow(number, len(prompt))
    pool.publish(number, len(prompt))
    return list(pool.blocks_of(number))


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2)])
def test_tokens_take_whole_blocks(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


class TestHashes:
    def test_there_is_one_for_every_full_block(self) -> None:
        assert len(HASHES) == 3
        assert len(set(HASHES)) == 3

    def test_the_last_token_is_never_covered(self) -> None:
        assert prefix_hashes("weak", PROMPT[: 2 * BLOCK_TOKENS]) == HASHES[:1]
        assert prefix_hashes("weak", PROMPT[: 2 * BLOCK_TOKENS + 1]) == HASHES[:2]

    @pytest.mark.parametrize("tokens", [0, 1, BLOCK_TOKENS])
    def test_a_short_prompt_has_none(self, tokens: int) -> None:
        assert prefix_hashes("weak", PROMPT[:tokens]) == []

    def test_routes_do_not_share(self) -> None:
        assert not set(HASHES) & set(prefix_hashes("strong", PROMPT))

    def test_each_covers_all_before_it(self) -> None:
        other = prefix_hashes("weak", [99, *PROMPT[1:]])
        assert not set(HASHES) & set(other)

    def test_the_same_beginning_has_the_same(self) -> None:
        other = prefix_hashes("weak", [*PROMPT[: 2 * BLOCK_TOKENS], *[5] * 40])
        assert other[:2] == HASHES[:2]
        assert other[2] != HASHES[2]


class TestGrowing:
    def test_blocks_are_handed_out_once(self) -> None:
        pool = BlockPool(4)
        for number in (1, 2):
            pool.begin(number, [], 0)
            assert pool.grow(number, 2 * BLOCK_TOKENS)
        assert sorted(pool.blocks_of(1) + pool.blocks_of(2)) == [0, 1, 2, 3]
        assert (pool.free_blocks, pool.usage) == (0, 1.0)

    def test_room_for_the_same_tokens_takes_nothing(self) -> None:
        pool = BlockPool(4)
        pool.begin(1, [], 0)
        pool.grow(1, 5)
        before = list(pool.blocks_of(1))
        assert pool.grow(1, BLOCK_TOKENS)
        assert pool.blocks_of(1) == before

    def test_without_room_nothing_changes(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        pool.grow(1, BLOCK_TOKENS)
        assert not pool.grow(1, 3 * BLOCK_TOKENS)
        assert (len(pool.blocks_of(1)), pool.free_blocks) == (1, 1)

    def test_more_than_the_pool_holds_never_fits(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        assert not pool.grow(1, 2 * BLOCK_TOKENS + 1)

    def test_what_is_released_is_free(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        pool.grow(1, 2 * BLOCK_TOKENS)
        pool.release(1)
        assert (pool.free_blocks, pool.usage) == (2, 0.0)

    def test_releasing_twice_does_no_harm(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        pool.grow(1, BLOCK_TOKENS)
        pool.release(1)
        pool.release(1)
        pool.release(99)
        assert pool.free_blocks == 2


class TestSharing:
    def test_nothing_is_known_before_it_is_computed(self) -> None:
        pool = BlockPool(8)
        pool.begin(1, HASHES, 0)
        pool.grow(1, len(PROMPT))
        assert pool.matching(HASHES) == 0
        pool.publish(1, 2 * BLOCK_TOKENS - 1)
        assert pool.matching(HASHES) == 1
        pool.publish(1, 2 * BLOCK_TOKENS)
        assert pool.matching(HASHES) == 2

    def test_publishing_less_than_before_takes_nothing_back(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        pool.publish(1, 1)
        assert pool.matching(HASHES) == 3

    def test_what_was_generated_is_not_shared(self) -> None:
        pool = BlockPool(8)
        pool.begin(1, HASHES, 0)
        pool.grow(1, 6 * BLOCK_TOKENS)
        pool.publish(1, 6 * BLOCK_TOKENS)
        pool.release(1)
        assert len(pool._idle) == 3

    def test_what_is_over_publishes_nothing(self) -> None:
        pool = BlockPool(8)
        pool.begin(1, HASHES, 0)
        pool.grow(1, len(PROMPT))
        pool.release(1)
        pool.publish(1, len(PROMPT))
        assert pool.matching(HASHES) == 0

    def test_a_second_sequence_takes_the_same_blocks(self) -> None:
        pool = BlockPool(8)
        first = published(pool, 1)
        assert pool.begin(2, HASHES, 2)
        assert pool.blocks_of(2) == first[:2]
        assert pool.grow(2, len(PROMPT))
        assert not set(pool.blocks_of(2)[2:]) & set(first)
        assert pool.free_blocks == 8 - 4 - 2

    def test_a_shared_block_stays_until_its_last_holder_is_gone(self) -> None:
        pool = BlockPool(8)
        first = published(pool, 1)
        pool.begin(2, HASHES, 3)
        pool.release(1)
        assert pool.free_blocks == 8 - 3
        assert pool.blocks_of(2) == first[:3]
        pool.release(2)
        assert pool.free_blocks == 8

    def test_what_is_not_here_is_refused(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        other = prefix_hashes("weak", [*PROMPT[:BLOCK_TOKENS], *[5] * 40])
        assert not pool.begin(2, other, 2)
        assert pool.begin(2, other, 1)

    def test_more_blocks_than_the_prompt_has_are_refused(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        assert not pool.begin(2, HASHES[:1], 2)

    def test_the_first_of_two_equal_blocks_stays_known(self) -> None:
        pool = BlockPool(16)
        first = published(pool, 1)
        second = published(pool, 2)
        pool.release(2)
        pool.begin(3, HASHES, 3)
        assert pool.blocks_of(3) == first[:3]
        assert not set(first) & set(second)

    def test_it_counts_what_was_asked_for_and_found(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        pool.begin(2, HASHES, 2)
        assert (pool.asked_tokens, pool.reused_tokens) == (6 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)


class TestForgetting:
    def test_a_beginning_outlives_its_sequence(self) -> None:
        pool = BlockPool(8)
        first = published(pool, 1)
        pool.release(1)
        assert pool.free_blocks == 8
        assert pool.begin(2, HASHES, 3)
        assert pool.blocks_of(2) == first[:3]
        assert pool.free_blocks == 5

    def test_blocks_that_remember_nothing_go_first(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        pool.release(1)
        pool.begin(2, [], 0)
        pool.grow(2, 5 * BLOCK_TOKENS)
        assert pool.matching(HASHES) == 3

    def test_the_end_of_a_beginning_goes_before_its_start(self) -> None:
        pool = BlockPool(4)
        published(pool, 1)
        pool.release(1)
        pool.begin(2, [], 0)
        for known in (3, 2, 1, 0):
            assert pool.matching(HASHES) == known
            pool.grow(2, (5 - known) * BLOCK_TOKENS)

    def test_the_longest_unused_goes_first(self) -> None:
        pool = BlockPool(8)
        other = [500 + token for token in PROMPT]
        published(pool, 1)
        published(pool, 2, other)
        pool.release(1)
        pool.release(2)
        # Used once more, and so the younger of the two.
        pool.begin(3, HASHES, 3)
        pool.release(3)
        pool.begin(4, [], 0)
        pool.grow(4, 5 * BLOCK_TOKENS)
        assert pool.matching(HASHES) == 3
        assert pool.matching(prefix_hashes("weak", other)) == 0

    def test_a_block_that_is_taken_is_forgotten(self) -> None:
        pool = BlockPool(4)
        published(pool, 1)
        pool.release(1)
        pool.begin(2, [], 0)
        pool.grow(2, 4 * BLOCK_TOKENS)
        assert not pool.begin(3, HASHES, 1)
        pool.release(2)
        assert pool.matching(HASHES) == 0


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_every_block_has_one_place(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(12)
    live: dict[int, tuple[list[bytes], int]] = {}
    for number in range(400):
        if live and draw.random() < 0.6:
            chosen = draw.choice(sorted(live))
            hashes, tokens = live[chosen]
            if draw.random() < 0.5:
                pool.release(chosen)
                del live[chosen]
            elif pool.grow(chosen, tokens + 20):
                live[chosen] = (hashes, tokens + 20)
                pool.publish(chosen, tokens + 20)
        else:
            hashes = prefix_hashes("weak", [draw.randrange(2)] * draw.randrange(1, 80))
            reused = pool.matching(hashes)
            assert pool.begin(number, hashes, reused)
            live[number] = (hashes, reused * BLOCK_TOKENS)
        held = {block for sequence in live for block in pool.blocks_of(sequence)}
        assert pool.free_blocks == 12 - len(held)
        assert pool.usage == pytest.approx(len(held) / 12)
    for number in live:
        pool.release(number)
    assert pool.free_blocks == 12


class TestOtherBlocks:
    """A device may want larger ones."""

    def test_tokens_are_counted_in_them(self) -> None:
        pool = BlockPool(4, block_tokens=256)
        assert (pool.tokens, pool.blocks_for(256), pool.blocks_for(257)) == (1024, 1, 2)
        assert pool.begin(1, [], 0)
        assert pool.grow(1, 257)
        assert (len(pool.blocks_of(1)), pool.free_blocks) == (2, 2)
        assert not pool.grow(1, 1025)

    def test_whole_ones_are_shared(self) -> None:
        pool, prompt = BlockPool(8, block_tokens=256), list(range(600))
        hashes = pool.hashes("weak", prompt)
        assert len(hashes) == 2
        assert pool.hashes("weak", prompt[:257]) == hashes[:1]
        pool.begin(1, hashes, 0)
        pool.grow(1, 600)
        pool.publish(1, 511)
        assert pool.matching(hashes) == 1
        pool.publish(1, 512)
        pool.begin(2, hashes, pool.matching(hashes))
        assert pool.blocks_of(2) == pool.blocks_of(1)[:2]
        assert (pool.asked_tokens, pool.reused_tokens) == (2 * 512, 512)
