"""A shard that would say something else than the others is not asked."""

from __future__ import annotations

import pytest

from router_gateway.shards.compatibility import CompatibilityCheck
from stitch.v1.inference_pb2 import Model, RouteDescription
from stitch.v1.shard_pb2 import ShardIdentity
from tests.support.fake_shard import FakeShard
from tests.support.fleets import fleet_of

FIRST = ShardIdentity(
    tokenizer="abc",
    bottom=Model(revision="b1"),
    top=Model(revision="t1"),
    routes=[RouteDescription(name="weak", stitch="s1")],
    probe="p1",
)


@pytest.mark.parametrize(
    ("second", "objection"),
    [
        (ShardIdentity(tokenizer="xyz"), "its tokenizer is xyz, but the other shards have abc"),
        (ShardIdentity(bottom=Model(revision="b2")), "its bottom model is b2, but the other shards have b1"),
        (ShardIdentity(probe="p2"), "its probe is p2, but the other shards have p1"),
        (ShardIdentity(top=Model(revision="t2")), "its top model is t2, but the other shards have t1"),
        (
            ShardIdentity(routes=[RouteDescription(name="weak", stitch="s2")]),
            "its stitch of route weak is s2, but the other shards have s1",
        ),
    ],
)
def test_a_difference_is_named_with_both_sides(second: ShardIdentity, objection: str) -> None:
    agreement = CompatibilityCheck()
    assert agreement.objection(FIRST) is None
    assert agreement.objection(second) == objection


def test_what_a_shard_does_not_know_is_no_difference() -> None:
    agreement = CompatibilityCheck()
    assert agreement.objection(ShardIdentity()) is None
    assert agreement.objection(FIRST) is None
    assert agreement.objection(ShardIdentity(tokenizer="abc")) is None


async def test_a_shard_with_another_tokenizer_does_not_serve(caplog: pytest.LogCaptureFixture) -> None:
    other = FakeShard("top-0", "top")
    other.tokenizer = "words"
    async with fleet_of(FakeShard("bottom-0", "bottom"), other) as (_, fleet):
        await fleet.refresh(["bottom-0"])
        await fleet.refresh()
        assert [replica.serving for replica in fleet.replicas.values()] == [True, False]
    assert "its tokenizer is words, but the other shards have bytes" in caplog.text
