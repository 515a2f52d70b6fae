"""States are found by tokens, layer and tenant, within their bytes, and go with their block."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stitch_server.kv_cache.block_pool import BlockPool
from stitch_server.kv_cache.hidden_states import HiddenStateCache, Match

BLOCK_TOKENS, HIDDEN = 4, 3
ROW_BYTES = BLOCK_TOKENS * HIDDEN * 4
TOKENS = list(range(100, 120))
BLOCKS = [7, 3, 9, 1, 5]
LAYERS = (2, 5)


def cache(rows: int = 16, blocks: int = 16, first_layer: int = 0) -> HiddenStateCache:
    return HiddenStateCache(
        rows * ROW_BYTES, first_layer, LAYERS, HIDDEN, torch.device("cpu"), torch.float32, blocks, BLOCK_TOKENS
    )


def states_of(token_ids: Sequence[int], layer: int = 2) -> Tensor:
    """Values that differ between tokens and layers."""
    return torch.tensor([[layer, one, -one] for one in token_ids], dtype=torch.float32)


def keep(
    kept: HiddenStateCache,
    token_ids: Sequence[int] = TOKENS,
    blocks: Sequence[int] = BLOCKS,
    layer: int = 2,
    salt: str = "acme",
    chunk: int = 20,
) -> None:
    """Keeps the states of all tokens, `chunk` of them a pass."""
    for position in range(0, len(token_ids), chunk):
        length = min(chunk, len(token_ids) - position)
        slots = kept.reserve(salt, token_ids, layer, blocks, position, length)
        kept.write(slots, states_of(token_ids, layer)[position : position + len(slots)])


def found(kept: HiddenStateCache, token_ids: Sequence[int] = TOKENS, salt: str = "acme", last_layer: int = 2) -> Match:
    return kept.match(salt, token_ids, last_layer)


def evict(pool: BlockPool) -> None:
    """Takes all blocks for another sequence, and frees them."""
    assert pool.begin(99, [], 0)
    assert pool.grow(99, pool.tokens)
    pool.release(99)


class TestMatch:
    @pytest.mark.parametrize("chunk", [1, 3, 4, 20])
    def test_states_are_read_as_they_were_kept(self, chunk: int) -> None:
        kept = cache()
        keep(kept, chunk=chunk)
        assert found(kept) == Match(2, BLOCKS)
        for position, tokens in ((0, 20), (3, 6), (19, 1)):
            states = kept.read(2, BLOCKS, position, tokens)
            assert states is not None
            assert torch.equal(states, states_of(TOKENS[position : position + tokens]))
        assert kept.resumed_tokens == 27

    def test_full_blocks_alone_are_found(self) -> None:
        kept = cache()
        keep(kept, TOKENS[:11])
        assert found(kept) == Match(2, BLOCKS[:2])
        assert found(kept, TOKENS[:9]) == Match(2, BLOCKS[:2])

    def test_prefix_of_other_tokens_is_found_up_to_the_difference(self) -> None:
        kept = cache()
        keep(kept)
        assert found(kept, [*TOKENS[:10], 1, 2, 3]) == Match(2, BLOCKS[:2])
        assert not found(kept, [1, *TOKENS[1:]]).blocks

    def test_other_tenant_finds_nothing(self) -> None:
        kept = cache()
        keep(kept)
        assert not found(kept, salt="other").blocks
        assert not found(kept, salt="").blocks

    def test_states_after_the_session_s_last_layer_are_not_found(self) -> None:
        kept = cache()
        keep(kept, layer=5)
        assert not found(kept, last_layer=4).blocks
        assert found(kept, last_layer=5) == Match(5, BLOCKS)

    def test_match_spares_most_layers(self) -> None:
        kept = cache()
        keep(kept, TOKENS, layer=2)
        keep(kept, TOKENS[:12], [11, 12, 13], layer=5)
        assert found(kept, last_layer=5) == Match(5, [11, 12, 13])
        # Two blocks are cached anyway: three blocks of two layers are more than one of five.
        assert kept.match("acme", TOKENS, 5, reused_blocks=2) == Match(2, BLOCKS)

    def test_match_counts_layers_of_this_shard_alone(self) -> None:
        kept = cache(first_layer=1)
        keep(kept, TOKENS, layer=2)
        keep(kept, TOKENS[:8], [11, 12], layer=5)
        assert found(kept, last_layer=5) == Match(5, [11, 12])

    def test_match_that_is_no_longer_than_what_is_cached_is_none(self) -> None:
        kept = cache()
        keep(kept)
        assert not kept.match("acme", TOKENS, 5, reused_blocks=len(BLOCKS)).blocks

    def test_answer_of_unknown_tokens_is_not_found(self) -> None:
        kept = cache()
        # A shard in the middle of a chain has the tokens with which its session began.
        slots = kept.reserve("acme", TOKENS[:10], 2, BLOCKS, 0, 20)
        kept.write(slots, states_of(TOKENS)[: len(slots)])
        assert found(kept) == Match(2, BLOCKS[:2])


class TestKeeping:
    def test_states_after_a_gap_are_not_kept(self) -> None:
        kept = cache()
        assert kept.reserve("acme", TOKENS, 2, BLOCKS, 8, 12) == []
        assert kept.reserve("acme", TOKENS, 2, BLOCKS, 2, 4) == []
        assert kept.usage == 0

    def test_second_session_with_the_same_tokens_goes_on_in_its_own_blocks(self) -> None:
        kept, others = cache(), [10, 11, 12]
        keep(kept, TOKENS[:8])
        keep(kept, [*TOKENS[:8], 1, 2, 3, 4], others)
        assert found(kept) == Match(2, BLOCKS[:2])
        assert found(kept, [*TOKENS[:8], 1, 2, 3, 4]) == Match(2, [*BLOCKS[:2], others[2]])

    def test_discarded_block_ends_the_prefix(self) -> None:
        kept = cache()
        keep(kept)
        kept.discard(BLOCKS[2])
        assert found(kept) == Match(2, BLOCKS[:2])
        states = kept.read(2, BLOCKS, 4, 12)
        assert states is not None
        assert torch.equal(states, states_of(TOKENS[4:8]))
        assert kept.read(2, BLOCKS, 8, 4) is None
        assert [kept.holds(block) for block in BLOCKS] == [True, True, False, True, True]


class TestBound:
    def test_bytes_are_those_of_whole_blocks_within_the_capacity(self) -> None:
        assert cache(rows=3).nbytes == 3 * ROW_BYTES
        assert HiddenStateCache(
            3 * ROW_BYTES + 1, 0, LAYERS, HIDDEN, torch.device("cpu"), torch.float32, 16, BLOCK_TOKENS
        ).nbytes == (3 * ROW_BYTES)
        # Two layers of two blocks.
        assert cache(rows=100, blocks=2).nbytes == 4 * ROW_BYTES

    def test_capacity_below_a_block_is_refused(self) -> None:
        with pytest.raises(ValueError, match="hold no block"):
            cache(rows=0)

    def test_usage_is_the_share_of_rows(self) -> None:
        kept = cache(rows=10)
        keep(kept)
        assert kept.usage == pytest.approx(0.5)

    def test_prefix_longer_than_the_capacity_keeps_its_beginning(self) -> None:
        kept = cache(rows=3)
        keep(kept, chunk=4)
        assert kept.usage == 1
        assert found(kept).blocks == BLOCKS[:3]

    def test_end_of_the_least_recently_used_prefix_is_evicted_first(self) -> None:
        kept, others = cache(rows=6), [[one, *TOKENS[1:8]] for one in (1, 2)]
        keep(kept, TOKENS[:12], BLOCKS[:3])
        keep(kept, others[0], [10, 11])
        # Used again, so that the others are older.
        assert len(found(kept, TOKENS[:12]).blocks) == 3
        keep(kept, others[1], [12, 13])
        assert len(found(kept, TOKENS[:12]).blocks) == 3
        assert found(kept, others[0]).blocks == [10]
        assert found(kept, others[1]).blocks == [12, 13]

    def test_evicted_prefix_goes_whole_before_the_next_one(self) -> None:
        kept = cache(rows=5)
        keep(kept, TOKENS[:12], BLOCKS[:3])
        keep(kept, [1, *TOKENS[1:8]], [10, 11])
        for number in range(3):
            keep(kept, [2 + number, *TOKENS[1:4]], [12 + number])
        assert not found(kept, TOKENS[:12]).blocks
        assert found(kept, [1, *TOKENS[1:8]]).blocks == [10, 11]

    def test_block_that_others_follow_stays_until_they_are_evicted(self) -> None:
        kept = cache(rows=4)
        keep(kept, TOKENS[:8], BLOCKS[:2])
        keep(kept, [*TOKENS[:4], 1, 2, 3, 4], [BLOCKS[0], 10])
        keep(kept, [5, *TOKENS[1:8]], [11, 12])
        # The first block is the oldest, and a prefix that was used later needs it.
        assert not found(kept, TOKENS[:8]).blocks[1:]
        assert found(kept, [*TOKENS[:4], 1, 2, 3, 4]).blocks == [BLOCKS[0], 10]

    def test_random_sessions_read_their_own_states(self) -> None:
        draw, kept, pool = random.Random(5), cache(rows=9, blocks=24), None
        pool = BlockPool(24, BLOCK_TOKENS, kept)
        stems = [[draw.randrange(4) for _ in range(30)] for _ in range(3)]
        for number in range(400):
            token_ids = [*draw.choice(stems)[: draw.randrange(30)], draw.randrange(4)]
            salt, layer = draw.choice("ab"), draw.choice(LAYERS)
            match = kept.match(salt, token_ids, layer)
            assert pool.begin(number, [], 0, found=match.blocks)
            blocks = pool.blocks_of(number)
            states = kept.read(match.layer, blocks, 0, len(match.blocks) * BLOCK_TOKENS)
            if states is not None:
                assert torch.equal(states, states_of(token_ids, match.layer)[: len(states)])
            assert pool.grow(number, len(token_ids))
            keep(kept, token_ids, blocks, layer, salt, chunk=draw.randrange(1, 9))
            assert kept.usage <= 1
            if number >= 2:
                pool.release(number - 2)
        assert kept.resumed_tokens > 100


class TestPool:
    def test_kept_block_stays_until_its_room_is_needed(self) -> None:
        kept = cache()
        pool = BlockPool(8, BLOCK_TOKENS, kept)
        assert pool.begin(1, [], 0)
        assert pool.grow(1, 20)
        blocks = list(pool.blocks_of(1))
        keep(kept, blocks=blocks)
        pool.release(1)
        assert pool.usage == 0
        assert found(kept) == Match(2, blocks)
        assert pool.begin(2, [], 0, found=blocks)
        assert pool.blocks_of(2) == blocks
        pool.release(2)
        evict(pool)
        assert not found(kept).blocks
        assert kept.usage == 0

    def test_states_of_an_unfinished_block_go_with_its_session(self) -> None:
        kept = cache()
        pool = BlockPool(8, BLOCK_TOKENS, kept)
        assert pool.begin(1, [], 0)
        assert pool.grow(1, 3)
        keep(kept, TOKENS[:3], pool.blocks_of(1))
        assert kept.usage > 0
        pool.release(1)
        assert kept.usage == 0

    def test_session_shares_found_blocks_after_reused_ones(self) -> None:
        kept = cache()
        pool, hashes = BlockPool(16, BLOCK_TOKENS, kept), [b"first", b"second"]
        assert pool.begin(1, hashes, 0)
        assert pool.grow(1, 8)
        pool.publish(1, 8)
        assert pool.begin(2, [], 0)
        assert pool.grow(2, 20)
        others = list(pool.blocks_of(2))
        keep(kept, blocks=others)
        assert pool.begin(3, [b"first", b"third"], 1, found=others[:4])
        assert pool.blocks_of(3) == [pool.blocks_of(1)[0], *others[1:4]]
        assert pool.grow(3, 4)
        assert len(pool.blocks_of(3)) == 4

    def test_block_is_published_for_two_routes_and_forgotten_for_both(self) -> None:
        pool = BlockPool(4, BLOCK_TOKENS)
        assert pool.begin(1, [b"weak"], 0)
        assert pool.grow(1, 4)
        pool.publish(1, 4)
        assert pool.begin(2, [b"strong"], 0, found=pool.blocks_of(1))
        pool.publish(2, 4)
        assert pool.count_cached([b"weak"]) == pool.count_cached([b"strong"]) == 1
        for number in (1, 2):
            pool.release(number)
        assert pool.count_cached([b"weak"]) == pool.count_cached([b"strong"]) == 1
        evict(pool)
        assert pool.count_cached([b"weak"]) == pool.count_cached([b"strong"]) == 0
