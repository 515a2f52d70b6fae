"""Simulated clients through a real admission onto simulated shards, in virtual time: goodput, promises and shares."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from statistics import median
from typing import Any

import pytest

from router_gateway.admission.tenants import Tenant
from tests.support.simulated_first_shard import SimulatedFirstShard
from tests.support.simulated_shards import Counts, SimulatedShards, Simulation
from tests.support.virtual_time import run_virtually

# Answers of 32 tokens a second that the simulated shards give to 24 clients, who ask again at once.
PEAK_PER_SECOND = 3.9
SECONDS = 90.0

Returns = Callable[[float], bool]


async def closed_loop(simulation: Simulation, clients: int, seconds: float, tenant: str = "default") -> None:
    """Clients that ask again as soon as they have their answer."""
    end = simulation.clock() + seconds

    async def client() -> None:
        while simulation.clock() < end:
            if await simulation.request(tenant, deadline_seconds=None) == "refused":
                await asyncio.sleep(1.0)

    await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(simulation: Simulation, rate: float, seconds: float, returns: Returns, **request: Any) -> None:
    """Clients that ask at random moments, whatever becomes of the others; they come back within the time or not."""
    draw = Random(5)
    end = simulation.clock() + seconds
    tasks = []
    while simulation.clock() < end:
        comes_back = returns if draw.random() < 0.5 else lambda told: False
        within = lambda told, comes_back=comes_back: comes_back(told) and simulation.clock() + told < end  # noqa: E731
        tasks.append(asyncio.create_task(simulation.request(returns=within, **request)))
        await asyncio.sleep(draw.expovariate(rate))
    await asyncio.gather(*tasks)


async def overloaded(load: float, returns: Returns) -> Counts:
    simulation = Simulation()
    await closed_loop(simulation, 24, 30.0)
    counts = simulation.counts["default"] = Counts()
    returns_before = returned(simulation)
    await open_loop(simulation, load * PEAK_PER_SECOND, SECONDS, returns)
    counted = returned(simulation) - returns_before
    assert counted >= 0.95 * sum(counts.returned.values())
    await simulation.close()
    return counts


def returned(simulation: Simulation) -> float:
    """How many requests the metrics count as come back."""
    value = simulation.metrics.registry.get_sample_value
    counts = (value("stitch_admission_returns_total", {"outcome": outcome}) for outcome in ("admitted", "refused"))
    return sum(count or 0.0 for count in counts)


def simulate(story: Callable[[], Coroutine[Any, Any, Counts]]) -> Counts:
    return run_virtually(story())


@pytest.mark.parametrize("load", [2, 10])
@pytest.mark.parametrize("returns", [lambda told: False, lambda told: True], ids=["nobody returns", "half return"])
def test_overload_keeps_goodput_and_promises(load: float, returns: Returns) -> None:
    counts = simulate(lambda: overloaded(load, returns))
    assert counts.outcomes["finished"] >= 0.9 * PEAK_PER_SECOND * SECONDS
    assert counts.outcomes["late"] <= 0.03 * counts.outcomes["finished"]
    at_once = sum(seconds < 1.0 for seconds in counts.refusal_seconds)
    assert at_once >= 0.9 * len(counts.refusal_seconds)
    returned = sum(counts.returned.values())
    assert counts.returned["refused"] <= 0.1 * returned
    assert returned or not returns(0.0)


def test_promises_to_the_longest_answers_are_kept_on_slow_shards() -> None:
    async def story() -> Counts:
        simulation = Simulation(shards=SimulatedShards(speed=0.6))
        await closed_loop(simulation, 24, 30.0)
        counts = simulation.counts["default"] = Counts()
        # Beside as many others as may run, 48 tokens take as long as the deadline.
        await asyncio.gather(
            *(open_loop(simulation, 2.0, 200.0, lambda told: True, tokens=tokens) for tokens in (16, 24, 32, 40, 48))
        )
        await simulation.close()
        return counts

    counts = simulate(story)
    returned = sum(counts.returned.values())
    assert counts.returned["refused"] <= 0.1 * returned
    assert counts.returned["late"] <= 0.03 * returned
    assert counts.tokens >= 0.8 * 0.6 * PEAK_PER_SECOND * 32 * 200.0


def test_waiting_tenants_share_tokens_by_weight() -> None:
    async def story() -> dict[str, int]:
        simulation = Simulation(Tenant(name="one"), Tenant(name="three", weight=3))
        clients = [asyncio.create_task(closed_loop(simulation, 50, 90.0, name)) for name in ("one", "three")]
        await asyncio.sleep(30.0)
        before = {name: counts.tokens for name, counts in simulation.counts.items()}
        await asyncio.sleep(60.0)
        given = {name: counts.tokens - before[name] for name, counts in simulation.counts.items()}
        await asyncio.gather(*clients)
        await simulation.close()
        return given

    given = run_virtually(story())
    assert given["three"] / given["one"] == pytest.approx(3.0, rel=0.05)


def test_first_token_beside_another_tenants_flood_comes_within_twice_as_long_as_alone() -> None:
    async def story() -> tuple[list[float], list[float], int]:
        draw = Random(3)
        simulation = Simulation(Tenant(name="flood"), Tenant(name="other"), shards=SimulatedFirstShard())

        async def ttft() -> float:
            simulation.counts["other"].ttft_seconds.clear()
            await simulation.request("other", deadline_seconds=60.0, prompt_tokens=31, tokens=4)
            await asyncio.sleep(draw.uniform(0.5, 0.7))
            return simulation.counts["other"].ttft_seconds[0]

        async def flood() -> str:
            return await simulation.request(
                "flood", deadline_seconds=None, prompt_tokens=draw.randint(20, 70), tokens=64
            )

        alone = [await ttft() for _ in range(5)]
        tasks = [asyncio.create_task(flood()) for _ in range(330)]
        await asyncio.sleep(2.0)
        beside = [await ttft() for _ in range(30)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        left = len(simulation.admission.running)
        await simulation.close()
        return alone, beside, left

    alone, beside, left = run_virtually(story())
    assert median(beside) <= 2.0 * median(alone)
    assert sorted(beside)[len(beside) * 9 // 10] <= 3.0 * median(alone)
    assert left == 0


def test_deadline_that_allows_few_others_keeps_them_waiting() -> None:
    async def story() -> tuple[str, int]:
        simulation = Simulation(Tenant(name="slow"), Tenant(name="quick"))
        await closed_loop(simulation, 24, 30.0, "slow")
        backlog = [asyncio.create_task(closed_loop(simulation, 40, 40.0, "slow"))]
        await asyncio.sleep(20.0)
        # 100 tokens in 9 s: at most about a dozen requests may run.
        outcomes = [simulation.request("quick", deadline_seconds=9.0, tokens=100) for _ in range(3)]
        outcome = await asyncio.gather(*outcomes)
        await asyncio.gather(*backlog)
        await simulation.close()
        return outcome[0], simulation.counts["quick"].outcomes["late"]

    outcome, late = run_virtually(story())
    assert late == 0 or outcome == "finished"
