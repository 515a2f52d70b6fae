"""Tests of the compatibility check: which shards fit together, by what they state and by how many state it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from router_gateway.shards.compatibility import CompatibilityCheck, Fact, Voter
from stitch.cluster import ClusterConfig, GatewayConfig, ModelConfig, PairConfig, RouteConfig, ShardConfig
from stitch.v1 import shard_pb2
from stitch.v1.inference_pb2 import Model, RouteDescription
from stitch.v1.shard_pb2 import ShardIdentity

QUANTIZATION, STITCH, TOKENIZER = Fact("quantization"), Fact("stitch", "weak"), Fact("tokenizer")
NONE, INT8 = {QUANTIZATION: "none"}, {QUANTIZATION: "int8"}
STITCH_1, STITCH_2 = {STITCH: "s1"}, {STITCH: "s2"}


def cluster(bottoms: int = 2, tops: int = 2, stitch: str | None = "weak.safetensors") -> ClusterConfig:
    shards = [
        ShardConfig(name=f"{role}-{index}", role=role, layers=layers, address="127.0.0.1:1")
        for role, layers, count in (("bottom", (0, 4), bottoms), ("top", (4, 8), tops))
        for index in range(count)
    ]
    model = ModelConfig(id="fake", source="nowhere")
    return ClusterConfig(
        name="fake",
        models=PairConfig(bottom=model, top=model),
        routes=(RouteConfig(name="weak", bottom_layers=4, top_from=4, stitch=stitch),),
        shards=tuple(shards),
        gateway=GatewayConfig(address="127.0.0.1:0"),
    )


def voters(stated: Mapping[str, Mapping[Fact, str]], ejected: str = "", draining: str = "") -> list[Voter]:
    return [Voter(name, facts, name != draining, name == ejected) for name, facts in stated.items()]


def refused(check: CompatibilityCheck, stated: Mapping[str, Mapping[Fact, str]], **states: str) -> set[str]:
    """The shards that fit not after an update."""
    check.update(voters(stated, **states))
    return {name for name, facts in stated.items() if check.mismatch(facts) is not None}


FIRST = ShardIdentity(
    tokenizer="abc",
    wire_dtype=shard_pb2.DTYPE_FLOAT32,
    compute_dtype="float32",
    quantization="none",
    kv_block_tokens=16,
    bottom=Model(revision="b1", hidden_size=8),
    top=Model(revision="t1", hidden_size=4),
    routes=[RouteDescription(name="weak", stitch="s1", bottom_layers=4, top_from=4)],
    probe="p1",
)


def test_gates_of_a_route_are_a_fact() -> None:
    identity = ShardIdentity(routes=[RouteDescription(name="weak", ffn_skip="g1")])
    assert CompatibilityCheck(cluster()).facts_of(identity) == {Fact("FFN skip", "weak"): "g1"}


def test_cut_of_one_model_alone_is_a_fact() -> None:
    routes = [
        RouteDescription(name="small", top_from=0),
        RouteDescription(name="weak", bottom_layers=4, top_from=0),
        RouteDescription(name="whole", bottom_layers=4),
        RouteDescription(name="unknown"),
    ]
    facts = CompatibilityCheck(cluster()).facts_of(ShardIdentity(routes=routes))
    assert facts == {
        Fact("cut point", "small"): "0 to 0",
        Fact("cut point", "weak"): "4 to 0",
        Fact("cut point", "whole"): "4 to the end",
    }


def test_models_alone_do_not_make_both_models_one() -> None:
    one_stitched = cluster()
    with_whole = one_stitched.model_copy(
        update={"routes": (*one_stitched.routes, RouteConfig(name="whole", bottom_layers=4))}
    )
    assert Fact("top model") in CompatibilityCheck(with_whole).facts_of(FIRST)


@pytest.mark.parametrize(
    ("second", "mismatch"),
    [
        (ShardIdentity(tokenizer="xyz"), "its tokenizer is xyz, but that of first is abc"),
        (ShardIdentity(wire_dtype=shard_pb2.DTYPE_INT8), "its wire dtype is DTYPE_INT8, but that of first is"),
        (ShardIdentity(compute_dtype="bfloat16"), "its compute dtype is bfloat16, but that of first is float32"),
        (ShardIdentity(quantization="int8"), "its quantization is int8, but that of first is none"),
        (ShardIdentity(kv_block_tokens=256), "its KV block size is 256, but that of first is 16"),
        (ShardIdentity(bottom=Model(revision="b2", hidden_size=8)), "its bottom model is b2 of width 8, but that of"),
        (ShardIdentity(top=Model(revision="t1", hidden_size=5)), "its top model is t1 of width 5, but that of first"),
        (ShardIdentity(probe="p2"), "its probe is p2, but that of first is p1"),
        (
            ShardIdentity(routes=[RouteDescription(name="weak", stitch="s2")]),
            "its stitch of route weak is s2, but that of first is s1",
        ),
        (
            ShardIdentity(routes=[RouteDescription(name="weak", bottom_layers=3, top_from=4)]),
            "its cut point of route weak is 3 to 4, but that of first is 4 to 4",
        ),
    ],
)
def test_mismatch_names_both_sides(second: ShardIdentity, mismatch: str) -> None:
    check = CompatibilityCheck(cluster())
    check.update(voters({"first": check.facts_of(FIRST), "second": check.facts_of(second)}))
    assert check.mismatch(check.facts_of(FIRST)) is None
    assert (check.mismatch(check.facts_of(second)) or "").startswith(mismatch)


def test_unknown_facts_are_no_mismatch() -> None:
    check = CompatibilityCheck(cluster())
    stated = {name: check.facts_of(one) for name, one in (("first", FIRST), ("second", ShardIdentity(tokenizer="abc")))}
    assert refused(check, stated) == set()


def test_models_of_a_route_without_stitch_are_one() -> None:
    check = CompatibilityCheck(cluster(stitch=None))
    stated = {"bottom-0": ShardIdentity(bottom=Model(revision="m1")), "top-0": ShardIdentity(top=Model(revision="m2"))}
    assert refused(check, {name: check.facts_of(one) for name, one in stated.items()}) == {"top-0"}


class TestMajority:
    def test_more_shards_win_whatever_came_first(self) -> None:
        check = CompatibilityCheck(cluster())
        assert refused(check, {"bottom-0": INT8}) == set()
        stated = {"bottom-0": INT8, "bottom-1": NONE, "top-0": NONE, "top-1": NONE}
        assert refused(check, stated) == {"bottom-0"}

    def test_int8_replica_and_wrong_stitch_that_came_first_leave_a_chain(self) -> None:
        check = CompatibilityCheck(cluster(tops=3))
        check.update(voters({"top-0": {**NONE, **STITCH_2}}))
        stated = {
            "bottom-0": NONE,
            "bottom-1": INT8,
            "top-0": {**NONE, **STITCH_2},
            "top-1": {**NONE, **STITCH_1},
            "top-2": {**NONE, **STITCH_1},
        }
        assert refused(check, stated) == {"bottom-1", "top-0"}

    def test_fewer_shards_win_where_only_they_make_a_chain(self) -> None:
        check = CompatibilityCheck(cluster(bottoms=1, tops=3))
        stated = {"bottom-0": INT8, "top-0": INT8, "top-1": NONE, "top-2": NONE}
        assert refused(check, stated) == {"top-1", "top-2"}

    def test_draining_shard_makes_no_chain(self) -> None:
        check = CompatibilityCheck(cluster(bottoms=1))
        stated = {"bottom-0": NONE, "top-0": STITCH_1, "top-1": STITCH_2}
        assert refused(check, stated) == {"top-1"}
        assert refused(check, stated, draining="top-0") == {"top-0"}

    def test_equal_sides_keep_the_present_values(self) -> None:
        check = CompatibilityCheck(cluster(bottoms=1))
        stated = {"bottom-0": NONE, "top-0": STITCH_1, "top-1": STITCH_2}
        check.update(voters({"top-1": STITCH_2}))
        assert refused(check, stated) == {"top-0"}

    def test_ejected_shard_loses_against_an_equal_one_and_does_not_come_back_by_itself(self) -> None:
        check = CompatibilityCheck(cluster(bottoms=1))
        stated = {"bottom-0": NONE, "top-0": STITCH_1, "top-1": STITCH_2}
        assert refused(check, stated) == {"top-1"}
        assert refused(check, stated, ejected="top-0") == {"top-0"}
        assert refused(check, stated) == {"top-0"}

    def test_nothing_is_settled_when_the_others_are_gone(self) -> None:
        check = CompatibilityCheck(cluster(bottoms=1))
        assert refused(check, {"bottom-0": NONE, "top-0": STITCH_1, "top-1": STITCH_2}) == {"top-1"}
        assert refused(check, {"bottom-0": NONE, "top-1": STITCH_2}) == set()


class TestContinuing:
    def test_answer_continues_only_with_the_facts_that_it_began_with(self) -> None:
        check = CompatibilityCheck(cluster(bottoms=1))
        check.update(voters({"bottom-0": NONE, "top-0": STITCH_1}))
        began = check.facts
        assert check.continues(began, ("weak",))
        check.update(voters({"bottom-0": NONE, "top-1": STITCH_2}))
        assert not check.continues(began, ("weak",))
        # The stitch of another route changes nothing for this one.
        assert check.continues(began, ("strong",))

    def test_answer_continues_while_no_shard_states_a_fact(self) -> None:
        check = CompatibilityCheck(cluster())
        check.update(voters({"top-0": {**STITCH_1, TOKENIZER: "abc"}}))
        began = check.facts
        check.update([])
        assert check.continues(began, ("weak",))
