"""Tests of placement: complete chains of replicas that accept requests, by failures and free KV."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

from router_gateway.shards.placement import Chain, Placement, Prompt
from router_gateway.shards.registry import ShardRegistry
from tests.support.fake_shard import FakeShard
from tests.support.registries import registry_of

NO_FAILURES: Counter[str] = Counter()


def shards() -> list[FakeShard]:
    """Two replicas of each stage."""
    return [FakeShard(f"{role}-{index}", role) for role in ("bottom", "top") for index in range(2)]


def chosen(placement: Placement, failures: Counter[str] = NO_FAILURES) -> tuple[str, ...]:
    chain = placement.choose("strong", failures)
    assert chain is not None
    return chain.names


async def test_choose_takes_the_most_free_kv_on_every_stage() -> None:
    fakes = shards()
    for fake, free in zip(fakes, (10, 20, 40, 30), strict=True):
        fake.free_kv_tokens = free
    async with registry_of(*fakes) as (_, registry):
        await registry.refresh()
        assert chosen(Placement(registry)) == ("bottom-1", "top-0")


async def test_reserved_kv_spreads_requests_between_polls() -> None:
    async with registry_of(*shards()) as (_, registry):
        await registry.refresh()
        placement = Placement(registry)
        taken = []
        with ExitStack() as stack:
            for _ in range(4):
                chain = placement.choose("strong", NO_FAILURES)
                assert chain is not None
                stack.enter_context(placement.place(chain, 10, 100))
                taken.append(chain.first.config.name)
        assert taken == ["bottom-0", "bottom-1", "bottom-0", "bottom-1"]


async def test_failed_replicas_come_last() -> None:
    fakes = shards()
    fakes[1].free_kv_tokens = 1
    async with registry_of(*fakes) as (_, registry):
        await registry.refresh()
        assert chosen(Placement(registry), Counter({"bottom-0": 1})) == ("bottom-1", "top-0")


async def test_route_with_a_stage_without_replicas_has_no_chain() -> None:
    fakes = shards()
    async with registry_of(*fakes) as (_, registry):
        placement = Placement(registry)
        await registry.refresh([registry.replicas["bottom-0"], registry.replicas["bottom-1"]])
        assert placement.choose("strong", NO_FAILURES) is None
        assert not placement.reachable("strong")
        await registry.refresh([registry.replicas["top-1"]])
        assert chosen(placement) == ("bottom-0", "top-1")
        assert placement.reachable("strong")


async def test_draining_replica_is_never_chosen() -> None:
    fakes = shards()
    fakes[0].free_kv_tokens += 1
    fakes[0].draining = True
    async with registry_of(*fakes) as (_, registry):
        placement = Placement(registry)
        await registry.refresh()
        # Neither for its free KV nor because the other replica failed.
        assert chosen(placement) == ("bottom-1", "top-0")
        assert chosen(placement, Counter({"bottom-1": 9})) == ("bottom-1", "top-0")
        candidates = placement.choose_candidates(("weak", "strong"), NO_FAILURES)
        assert candidates is not None
        assert candidates.first.config.name == "bottom-1"


async def test_route_whose_only_replica_drains_is_not_reachable() -> None:
    bottom = FakeShard("bottom-0", "bottom")
    async with registry_of(bottom, FakeShard("top-0", "top")) as (_, registry):
        placement = Placement(registry)
        await registry.refresh()
        chain = placement.choose("strong", NO_FAILURES)
        assert chain is not None
        bottom.draining = True
        await registry.refresh()
        assert placement.choose("strong", NO_FAILURES) is None
        assert not placement.reachable("strong")
        assert chain.draining


async def test_next_names_leave_out_the_first_shard() -> None:
    async with registry_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        chain = await _only(registry)
        assert chain.next_names == ("top-0",)
        assert chain.first is registry.replicas["bottom-0"]


async def _only(registry: ShardRegistry) -> Chain:
    await registry.refresh()
    return Chain(tuple(registry.replicas.values()))


async def test_candidate_chains_share_their_first_shard() -> None:
    fakes = shards()
    fakes[1].free_kv_tokens += 1
    async with registry_of(*fakes) as (_, registry):
        await registry.refresh()
        placement = Placement(registry)
        fork = placement.choose_candidates(("weak", "strong"), NO_FAILURES)
        assert fork is not None
        assert {route: chain.names for route, chain in fork.by_route.items()} == {
            "weak": ("bottom-1", "top-0"),
            "strong": ("bottom-1", "top-0"),
        }
        assert fork.names == ("bottom-1", "top-0")
        with placement.place(fork, 10, 100):
            free = [registry.replicas[name].load.free_tokens for name in ("bottom-1", "top-0", "top-1")]
            assert free == [9_901, 9_900, 10_000]


async def test_candidate_chains_need_a_chain_for_every_route() -> None:
    fakes = shards()
    async with registry_of(*fakes) as (_, registry):
        await registry.refresh([registry.replicas["bottom-0"], registry.replicas["bottom-1"]])
        assert Placement(registry).choose_candidates(("weak", "strong"), NO_FAILURES) is None


PROMPT = Prompt("someone", tuple(range(40)))


def names_for(placement: Placement, prompt: Prompt) -> tuple[str, ...]:
    chain = placement.choose("strong", NO_FAILURES, prompt=prompt)
    assert chain is not None
    return chain.names


async def test_replica_that_has_computed_the_prefix_is_preferred_to_the_one_with_most_free_kv() -> None:
    async with registry_of(*shards()) as (_, registry):
        await registry.refresh()
        placement = Placement(registry)
        assert names_for(placement, PROMPT) == ("bottom-0", "top-0")
        placement.prefixes.record("someone", "strong", PROMPT.token_ids, ("bottom-1", "top-1"))
        assert names_for(placement, PROMPT) == ("bottom-1", "top-1")
        assert names_for(placement, Prompt("another", PROMPT.token_ids)) == ("bottom-0", "top-0")


async def test_bottom_shard_that_has_computed_the_prefix_on_another_route_is_preferred() -> None:
    async with registry_of(*shards()) as (_, registry):
        await registry.refresh()
        placement = Placement(registry)
        placement.prefixes.record("someone", "weak", PROMPT.token_ids, ("bottom-1", "top-1"))
        # The top's KV is of no use to another route.
        assert names_for(placement, PROMPT) == ("bottom-1", "top-0")
        assert names_for(placement, Prompt("another", PROMPT.token_ids)) == ("bottom-0", "top-0")


async def test_prefix_on_the_same_route_counts_more_than_one_on_another_route() -> None:
    async with registry_of(*shards()) as (_, registry):
        await registry.refresh()
        placement = Placement(registry)
        placement.prefixes.record("someone", "weak", PROMPT.token_ids, ("bottom-0", "top-0"))
        placement.prefixes.record("someone", "strong", PROMPT.token_ids, ("bottom-1", "top-1"))
        assert names_for(placement, PROMPT) == ("bottom-1", "top-1")


async def test_prefix_counts_only_after_the_first_shard_that_computed_it() -> None:
    async with registry_of(*shards()) as (_, registry):
        await registry.refresh()
        placement = Placement(registry)
        placement.prefixes.record("someone", "strong", PROMPT.token_ids, ("bottom-1", "top-1"))
        chain = placement.choose("strong", Counter({"bottom-1": 1}), prompt=PROMPT)
        assert chain is not None
        assert chain.names == ("bottom-0", "top-0")


async def test_prefixes_make_no_replica_busier_than_others_by_more_than_a_bound() -> None:
    async with registry_of(*shards()) as (_, registry):
        await registry.refresh()
        placement = Placement(registry)
        placement.prefixes.record("someone", "strong", PROMPT.token_ids, ("bottom-1", "top-1"))
        with ExitStack() as running:
            placed = Counter[str]()
            for _number in range(20):
                chain = placement.choose("strong", NO_FAILURES, prompt=PROMPT)
                assert chain is not None
                placed.update(chain.names)
                running.enter_context(placement.place(chain, 40, 50))
        assert placed["bottom-0"] < placed["bottom-1"] <= placed["bottom-0"] + 3
