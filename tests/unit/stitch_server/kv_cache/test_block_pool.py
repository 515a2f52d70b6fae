"""Blocks are counted by holder, shared by prefix, and evicted in the order of their last use."""

from __future__ import annotations

import random

import pytest

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool, blocks_for, prefix_hashes

PROMPT = list(range(3 * BLOCK_TOKENS + 1))
HASHES = prefix_hashes("acme", "weak", PROMPT)


def published(pool: BlockPool, number: int, prompt: list[int] = PROMPT) -> list[int]:
    """Starts a sequence whose whole prompt is computed; returns its blocks."""
    assert pool.begin(number, prefix_hashes("acme", "weak", prompt), 0)
    assert pool.grow(number, len(prompt))
    pool.publish(number, len(prompt))
    return list(pool.blocks_of(number))


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2)])
def test_tokens_are_rounded_up_to_blocks(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


class TestHashes:
    def test_every_full_block_has_a_hash(self) -> None:
        assert len(HASHES) == 3
        assert len(set(HASHES)) == 3

    def test_last_token_is_in_no_hashed_block(self) -> None:
        assert prefix_hashes("acme", "weak", PROMPT[: 2 * BLOCK_TOKENS]) == HASHES[:1]
        assert prefix_hashes("acme", "weak", PROMPT[: 2 * BLOCK_TOKENS + 1]) == HASHES[:2]

    @pytest.mark.parametrize("tokens", [0, 1, BLOCK_TOKENS])
    def test_prompt_shorter_than_a_block_has_no_hash(self, tokens: int) -> None:
        assert prefix_hashes("acme", "weak", PROMPT[:tokens]) == []

    def test_routes_have_different_hashes(self) -> None:
        assert not set(HASHES) & set(prefix_hashes("acme", "strong", PROMPT))

    def test_tenants_have_different_hashes(self) -> None:
        assert not set(HASHES) & set(prefix_hashes("other", "weak", PROMPT))
        assert not set(HASHES) & set(prefix_hashes("", "weak", PROMPT))

    def test_salt_and_route_are_not_interchangeable(self) -> None:
        assert not set(prefix_hashes("ab", "c", PROMPT)) & set(prefix_hashes("a", "bc", PROMPT))

    def test_hash_covers_all_tokens_up_to_its_block(self) -> None:
        other = prefix_hashes("acme", "weak", [99, *PROMPT[1:]])
        assert not set(HASHES) & set(other)

    def test_same_prefix_has_the_same_hashes(self) -> None:
        other = prefix_hashes("acme", "weak", [*PROMPT[: 2 * BLOCK_TOKENS], *[5] * 40])
        assert other[:2] == HASHES[:2]
        assert other[2] != HASHES[2]


class TestGrowing:
    def test_each_block_has_one_holder(self) -> None:
        pool = BlockPool(4)
        for number in (1, 2):
            pool.begin(number, [], 0)
            assert pool.grow(number, 2 * BLOCK_TOKENS)
        assert sorted(pool.blocks_of(1) + pool.blocks_of(2)) == [0, 1, 2, 3]
        assert (pool.free_blocks, pool.usage) == (0, 1.0)

    def test_growing_within_the_last_block_allocates_nothing(self) -> None:
        pool = BlockPool(4)
        pool.begin(1, [], 0)
        pool.grow(1, 5)
        before = list(pool.blocks_of(1))
        assert pool.grow(1, BLOCK_TOKENS)
        assert pool.blocks_of(1) == before

    def test_failed_growth_changes_nothing(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        pool.grow(1, BLOCK_TOKENS)
        assert not pool.grow(1, 3 * BLOCK_TOKENS)
        assert (len(pool.blocks_of(1)), pool.free_blocks) == (1, 1)

    def test_sequence_larger_than_the_pool_does_not_fit(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        assert not pool.grow(1, 2 * BLOCK_TOKENS + 1)

    def test_released_blocks_are_free(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        pool.grow(1, 2 * BLOCK_TOKENS)
        pool.release(1)
        assert (pool.free_blocks, pool.usage) == (2, 0.0)

    def test_releasing_twice_changes_nothing(self) -> None:
        pool = BlockPool(2)
        pool.begin(1, [], 0)
        pool.grow(1, BLOCK_TOKENS)
        pool.release(1)
        pool.release(1)
        pool.release(99)
        assert pool.free_blocks == 2


class TestSharing:
    def test_blocks_are_shared_only_once_computed(self) -> None:
        pool = BlockPool(8)
        pool.begin(1, HASHES, 0)
        pool.grow(1, len(PROMPT))
        assert pool.count_cached(HASHES) == 0
        pool.publish(1, 2 * BLOCK_TOKENS - 1)
        assert pool.count_cached(HASHES) == 1
        pool.publish(1, 2 * BLOCK_TOKENS)
        assert pool.count_cached(HASHES) == 2

    def test_publishing_fewer_tokens_keeps_published_blocks(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        pool.publish(1, 1)
        assert pool.count_cached(HASHES) == 3

    def test_blocks_of_generated_tokens_are_not_cached(self) -> None:
        pool = BlockPool(8)
        pool.begin(1, HASHES, 0)
        pool.grow(1, 6 * BLOCK_TOKENS)
        pool.publish(1, 6 * BLOCK_TOKENS)
        pool.release(1)
        assert len(pool._cached) == 3

    def test_released_sequence_publishes_nothing(self) -> None:
        pool = BlockPool(8)
        pool.begin(1, HASHES, 0)
        pool.grow(1, len(PROMPT))
        pool.release(1)
        pool.publish(1, len(PROMPT))
        assert pool.count_cached(HASHES) == 0

    def test_second_sequence_shares_the_blocks_of_its_prefix(self) -> None:
        pool = BlockPool(8)
        first = published(pool, 1)
        assert pool.begin(2, HASHES, 2)
        assert pool.blocks_of(2) == first[:2]
        assert pool.grow(2, len(PROMPT))
        assert not set(pool.blocks_of(2)[2:]) & set(first)
        assert pool.free_blocks == 8 - 4 - 2

    def test_shared_block_is_freed_with_its_last_holder(self) -> None:
        pool = BlockPool(8)
        first = published(pool, 1)
        pool.begin(2, HASHES, 3)
        pool.release(1)
        assert pool.free_blocks == 8 - 3
        assert pool.blocks_of(2) == first[:3]
        pool.release(2)
        assert pool.free_blocks == 8

    def test_sequence_with_an_uncached_block_is_refused(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        other = prefix_hashes("acme", "weak", [*PROMPT[:BLOCK_TOKENS], *[5] * 40])
        assert not pool.begin(2, other, 2)
        assert pool.begin(2, other, 1)

    def test_reusing_more_blocks_than_hashes_is_refused(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        assert not pool.begin(2, HASHES[:1], 2)

    def test_first_of_two_equal_blocks_stays_cached(self) -> None:
        pool = BlockPool(16)
        first = published(pool, 1)
        second = published(pool, 2)
        pool.release(2)
        pool.begin(3, HASHES, 3)
        assert pool.blocks_of(3) == first[:3]
        assert not set(first) & set(second)

    def test_queried_and_reused_tokens_are_counted(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        pool.begin(2, HASHES, 2)
        assert (pool.queried_tokens, pool.reused_tokens) == (6 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)


class TestEviction:
    def test_prefix_stays_cached_after_its_sequence(self) -> None:
        pool = BlockPool(8)
        first = published(pool, 1)
        pool.release(1)
        assert pool.free_blocks == 8
        assert pool.begin(2, HASHES, 3)
        assert pool.blocks_of(2) == first[:3]
        assert pool.free_blocks == 5

    def test_free_blocks_are_used_before_cached_ones(self) -> None:
        pool = BlockPool(8)
        published(pool, 1)
        pool.release(1)
        pool.begin(2, [], 0)
        pool.grow(2, 5 * BLOCK_TOKENS)
        assert pool.count_cached(HASHES) == 3

    def test_later_blocks_of_a_prefix_are_evicted_first(self) -> None:
        pool = BlockPool(4)
        published(pool, 1)
        pool.release(1)
        pool.begin(2, [], 0)
        for cached in (3, 2, 1, 0):
            assert pool.count_cached(HASHES) == cached
            pool.grow(2, (5 - cached) * BLOCK_TOKENS)

    def test_least_recently_used_prefix_is_evicted_first(self) -> None:
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
        assert pool.count_cached(HASHES) == 3
        assert pool.count_cached(prefix_hashes("acme", "weak", other)) == 0

    def test_reallocated_block_is_no_longer_cached(self) -> None:
        pool = BlockPool(4)
        published(pool, 1)
        pool.release(1)
        pool.begin(2, [], 0)
        pool.grow(2, 4 * BLOCK_TOKENS)
        assert not pool.begin(3, HASHES, 1)
        pool.release(2)
        assert pool.count_cached(HASHES) == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_keep_block_counts_consistent(seed: int) -> None:
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
            hashes = prefix_hashes("acme", "weak", [draw.randrange(2)] * draw.randrange(1, 80))
            reused = pool.count_cached(hashes)
            assert pool.begin(number, hashes, reused)
            live[number] = (hashes, reused * BLOCK_TOKENS)
        held = {block for sequence in live for block in pool.blocks_of(sequence)}
        assert pool.free_blocks == 12 - len(held)
        assert pool.usage == pytest.approx(len(held) / 12)
    for number in live:
        pool.release(number)
    assert pool.free_blocks == 12


class TestLargerBlocks:
    """Blocks of 256 tokens, as flash attention requires."""

    def test_capacity_is_counted_in_blocks_of_their_size(self) -> None:
        pool = BlockPool(4, block_tokens=256)
        assert (pool.tokens, pool.blocks_for(256), pool.blocks_for(257)) == (1024, 1, 2)
        assert pool.begin(1, [], 0)
        assert pool.grow(1, 257)
        assert (len(pool.blocks_of(1)), pool.free_blocks) == (2, 2)
        assert not pool.grow(1, 1025)

    def test_only_full_blocks_are_shared(self) -> None:
        pool, prompt = BlockPool(8, block_tokens=256), list(range(600))
        hashes = pool.hashes("acme", "weak", prompt)
        assert len(hashes) == 2
        assert pool.hashes("acme", "weak", prompt[:257]) == hashes[:1]
        pool.begin(1, hashes, 0)
        pool.grow(1, 600)
        pool.publish(1, 511)
        assert pool.count_cached(hashes) == 1
        pool.publish(1, 512)
        pool.begin(2, hashes, pool.count_cached(hashes))
        assert pool.blocks_of(2) == pool.blocks_of(1)[:2]
        assert (pool.queried_tokens, pool.reused_tokens) == (2 * 512, 512)
