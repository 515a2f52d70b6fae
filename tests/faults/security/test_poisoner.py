"""A foreign link can't leave KV that later sessions take for that of their prompt."""

from __future__ import annotations

import pytest

from stitch.v1 import inference_pb2, shard_pb2
from tests.support.byte_tokenizer import tokens
from tests.support.link_peer import hidden_states, open_link_peer
from tests.support.processes import Cluster
from tests.support.waiting import becomes_true

PROMPT = "the quick brown fox jumps over the lazy dog, and Paris is the capital of France; hello world, hello there"
WIDTH = 48
RELEASE_SECONDS = 10.0
POISON = 3.0

pytestmark = pytest.mark.slow


def answer(cluster: Cluster) -> tuple[int, ...]:
    return cluster.generate(PROMPT, route="weak", max_tokens=12, ignore_eos=True).token_ids


def poisoned_step() -> shard_pb2.Step:
    """A step that opens a session with the known prompt, and hidden states that no bottom shard computes."""
    ids = tokens(PROMPT)
    session = shard_pb2.NewSession(
        route="weak", prompt_tokens=len(ids), token_ids=ids, sampling=inference_pb2.Sampling(max_tokens=1)
    )
    segment = shard_pb2.Segment(session=1, length=len(ids), wants_token=True, new_session=session)
    return shard_pb2.Step(step=1, segments=[segment], hidden=hidden_states([POISON] * len(ids) * WIDTH, len(ids)))


async def test_kv_of_a_foreign_link_is_not_used_by_others(tiny_cluster: Cluster) -> None:
    cluster = tiny_cluster
    before = answer(cluster)
    # The first shard has the prompt's KV cached and says so; the restarted top shard has none.
    cluster.restart("top-0")
    async with open_link_peer(cluster.address("top-0"), like=cluster.address("bottom-0")) as link:
        await link.shake_hands()
        reply = await link.run_step(poisoned_step())
        assert len(reply.tokens) == 1
        assert answer(cluster) == before
    assert becomes_true(lambda: cluster.metric("top-0", "stitch_kv_cache_usage_ratio") == 0, RELEASE_SECONDS)
    assert answer(cluster) == before


def test_kv_of_the_own_link_is_used_again(tiny_cluster: Cluster) -> None:
    cluster = tiny_cluster
    answer(cluster)
    before = cluster.metric("top-0", "stitch_prefix_tokens_reused_total")
    answer(cluster)
    assert cluster.metric("top-0", "stitch_prefix_tokens_reused_total") > before
