"""Tests of the model registry: the cluster file alone, then with the identities of shards."""

from __future__ import annotations

import pytest

from router_gateway.shards.models import ModelRegistry
from stitch.errors import Unavailable
from stitch.membership import Membership
from tests.support.fake_shard import CONTEXT_TOKENS, VOCABULARY_SIZE, FakeShard
from tests.support.registries import registry_of


async def test_description_before_any_answer_is_that_of_the_file() -> None:
    async with registry_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (cluster, registry):
        models = ModelRegistry(Membership(cluster), registry)
        described = models.describe()
        assert described.bottom.id == "fake"
        assert described.bottom.layers == 0
        assert [(route.name, route.bottom_layers, route.top_from) for route in described.routes] == [
            ("weak", 2, 4),
            ("strong", 4, 4),
        ]
        assert [shard.serving for shard in described.shards] == [False, False]
        with pytest.raises(Unavailable, match="no shard"):
            _ = models.context_tokens


async def test_description_includes_shard_identities() -> None:
    top = FakeShard("top-0", "top")
    async with registry_of(FakeShard("bottom-0", "bottom"), top) as (cluster, registry):
        await registry.refresh()
        models = ModelRegistry(Membership(cluster), registry)
        await top.stop()
        await registry.refresh()
        described = models.describe()
        assert described.cluster == "fake"
        assert described.bottom.layers == 8
        assert [route.parameters for route in described.routes] == [1_100, 1_400]
        assert [(shard.name, shard.serving) for shard in described.shards] == [("bottom-0", True), ("top-0", False)]
        assert [route.stitch for route in described.routes] == ["s1", ""]
        assert described.shards[1].dtype == "float32"
        assert models.context_tokens == CONTEXT_TOKENS
        assert models.vocabulary_size == VOCABULARY_SIZE


async def test_description_shows_a_draining_shard_as_not_serving() -> None:
    top = FakeShard("top-0", "top")
    top.draining = True
    async with registry_of(FakeShard("bottom-0", "bottom"), top) as (cluster, registry):
        await registry.refresh()
        described = ModelRegistry(Membership(cluster), registry).describe()
        assert [shard.serving for shard in described.shards] == [True, False]


async def test_context_is_limited_by_the_smallest_kv() -> None:
    top = FakeShard("top-0", "top")
    top.kv_capacity_tokens = CONTEXT_TOKENS - 1
    async with registry_of(FakeShard("bottom-0", "bottom"), top) as (cluster, registry):
        await registry.refresh()
        assert ModelRegistry(Membership(cluster), registry).context_tokens == CONTEXT_TOKENS - 1


async def test_routes_are_ordered_by_parameters_once_all_are_known() -> None:
    bottom = FakeShard("bottom-0", "bottom")
    # A route with fewer bottom layers may read more parameters if it has more top layers.
    bottom.parameters = {"weak": 1_000, "strong": 900}
    async with registry_of(bottom, FakeShard("top-0", "top")) as (cluster, registry):
        models = ModelRegistry(Membership(cluster), registry)
        assert models.routes() == ["weak", "strong"]
        await registry.refresh([registry.replicas["bottom-0"]])
        assert models.routes() == ["weak", "strong"]
        await registry.refresh([registry.replicas["top-0"]])
        assert models.routes() == ["strong", "weak"]


async def test_routes_are_ordered_by_layers_while_one_is_unknown() -> None:
    bottom = FakeShard("bottom-0", "bottom")
    bottom.parameters = {"weak": 9_000}
    async with registry_of(bottom, FakeShard("top-0", "top")) as (cluster, registry):
        await registry.refresh()
        assert ModelRegistry(Membership(cluster), registry).routes() == ["weak", "strong"]


async def test_costs_are_relative_to_the_costliest_route() -> None:
    bottom = FakeShard("bottom-0", "bottom")
    async with registry_of(bottom, FakeShard("top-0", "top")) as (cluster, registry):
        models = ModelRegistry(Membership(cluster), registry)
        await registry.refresh([registry.replicas["bottom-0"]])
        assert models.costs() == {}
        await registry.refresh([registry.replicas["top-0"]])
        assert models.costs() == {"weak": 1_100 / 1_400, "strong": 1.0}


async def test_forced_tokens_are_limited_by_the_smaller_vocabulary_and_prompts_by_the_bottom() -> None:
    bottom, top = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")
    bottom.vocabulary_size = VOCABULARY_SIZE + 8
    async with registry_of(bottom, top) as (cluster, registry):
        await registry.refresh()
        models = ModelRegistry(Membership(cluster), registry)
        assert (models.vocabulary_size, models.prompt_vocabulary_size) == (VOCABULARY_SIZE, VOCABULARY_SIZE + 8)


async def test_description_has_the_state_of_every_replica_and_the_source_of_the_shards() -> None:
    shards = [FakeShard("bottom-0", "bottom"), *(FakeShard(f"top-{index}", "top") for index in range(4))]
    shards[1].draining = True
    async with registry_of(*shards) as (cluster, registry):
        await registry.refresh([one for name, one in registry.replicas.items() if name != "top-3"])
        await shards[2].stop()
        await registry.refresh([registry.replicas["top-1"]])
        described = ModelRegistry(Membership(cluster), registry).describe()
        states = {shard.name: shard.state for shard in described.shards}
        assert states == {
            "bottom-0": "ready",
            "top-0": "draining",
            "top-1": "gone",
            "top-2": "ready",
            "top-3": "wanted",
        }
        assert described.membership.source == "fixed"
        members = tuple(shard for shard in cluster.shards if shard.name != "top-2")
        registry.take(cluster.model_copy(update={"shards": members}))
        assert registry.all_replicas[-1].state == "draining"
