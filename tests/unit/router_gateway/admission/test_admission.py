"""Tests of single rules of admission, with clients and shards in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from router_gateway.admission.admission import Demand, Status, Ticket
from router_gateway.admission.tenants import Credentials, Tenant
from stitch.errors import Exhausted, Expired, InvalidRequest
from tests.support.simulated_shards import ROUTE, Simulation
from tests.support.virtual_time import run_virtually

Result = TypeVar("Result")


def simulate(story: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    return run_virtually(story())


def ticket_of(simulation: Simulation, deadline: float | None = None, digest: bytes = b"") -> Ticket:
    return simulation.admission.admit(Credentials("default"), Demand(32, ROUTE, deadline, lambda: digest))


async def started(ticket: Ticket, tokens: int = 32) -> Ticket:
    await ticket.start(ROUTE, 10, tokens, is_exact=True)
    return ticket


def waiting(ticket: Ticket) -> asyncio.Task[Ticket]:
    return asyncio.create_task(started(ticket))


def test_request_starts_without_waiting_where_shards_have_room() -> None:
    async def story() -> None:
        simulation = Simulation()
        with await started(ticket_of(simulation)) as ticket:
            assert (ticket.status, len(simulation.admission.running)) == (Status.RUNNING, 1)
        assert (ticket.status, len(simulation.admission.running)) == (Status.ENDED, 0)
        await simulation.close()

    simulate(story)


def test_request_for_several_answers_runs_as_that_many_with_one_prompt() -> None:
    async def story() -> None:
        simulation = Simulation()
        demand = Demand(32, ROUTE, None, lambda: b"", answers=4)
        with simulation.admission.admit(Credentials("default"), demand) as ticket:
            await started(ticket)
            assert len(simulation.admission.running) == 4
            assert (ticket.size.tokens, ticket.size.prompt_tokens) == (10 + 4 * 32, 10)
            for _ in range(4):
                assert not ticket.is_complete
                ticket.record_tokens(32)
                ticket.record_finish(32, at_limit=True)
            assert ticket.is_complete
        assert len(simulation.admission.running) == 0
        await simulation.close()

    simulate(story)


def test_requests_above_the_tenants_max_running_wait() -> None:
    async def story() -> None:
        simulation = Simulation(Tenant(name="default", max_running=1))
        first = await started(ticket_of(simulation))
        second = waiting(ticket_of(simulation))
        await asyncio.sleep(1.0)
        assert not second.done()
        simulation.admission.end(first)
        assert (await second).status is Status.RUNNING
        await simulation.close()

    simulate(story)


@pytest.mark.parametrize("cheaper", [True, False])
def test_pressure_is_the_share_of_the_time_for_which_a_request_may_wait(cheaper: bool) -> None:
    async def story() -> None:
        simulation = Simulation(Tenant(name="default", max_running=1), cheaper_under_load=cheaper)
        first = await started(ticket_of(simulation))
        for deadline in (100.0, 20.0):
            ticket = ticket_of(simulation, deadline)
            wait, pressure = ticket.expected_wait()
            assert wait == pytest.approx(ticket.service_seconds)
            assert pressure == pytest.approx(wait / (deadline - wait) if cheaper else 0.0)
        simulation.admission.end(first)
        assert ticket_of(simulation, 20.0).expected_wait() == (0.0, 0.0)
        await simulation.close()

    simulate(story)


def test_requests_above_the_tenants_max_waiting_are_refused() -> None:
    async def story() -> None:
        simulation = Simulation(Tenant(name="default", max_running=1, max_waiting=1))
        await started(ticket_of(simulation))
        waits = waiting(ticket_of(simulation))
        await asyncio.sleep(0.1)
        with pytest.raises(Exhausted, match="1 requests of tenant default wait already") as caught:
            ticket_of(simulation)
        assert caught.value.retry_after_seconds > 0
        waits.cancel()
        await simulation.close()

    simulate(story)


def test_client_that_leaves_while_it_waits_holds_nothing() -> None:
    async def story() -> None:
        simulation = Simulation(Tenant(name="default", max_running=1))
        first = await started(ticket_of(simulation))

        async def leaves() -> None:
            with ticket_of(simulation) as ticket:
                await started(ticket)

        left = asyncio.create_task(leaves())
        await asyncio.sleep(0.1)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        third = waiting(ticket_of(simulation))
        await asyncio.sleep(0.1)
        simulation.admission.end(first)
        assert (await third).status is Status.RUNNING
        assert len(simulation.admission.running) == 1
        await simulation.close()

    simulate(story)


def test_deadline_that_passes_while_a_request_waits_expires_it() -> None:
    async def story() -> None:
        simulation = Simulation(Tenant(name="default", max_running=1))
        first = await started(ticket_of(simulation))
        second = waiting(ticket_of(simulation, deadline=8.0))
        await asyncio.sleep(9.0)
        simulation.admission.end(first)
        with pytest.raises(Expired):
            await second
        await simulation.close()

    simulate(story)


def test_request_without_a_deadline_gets_the_default() -> None:
    async def story() -> None:
        simulation = Simulation(default_deadline_seconds=50.0)
        await asyncio.sleep(10.0)
        assert ticket_of(simulation).deadline == pytest.approx(60.0)
        assert ticket_of(simulation, deadline=12.0).deadline == 12.0
        await simulation.close()

    simulate(story)


def test_tokens_a_minute_are_refused_until_they_are_refilled() -> None:
    async def story() -> tuple[float, float]:
        simulation = Simulation(Tenant(name="default", tokens_per_minute=60))
        with await started(ticket_of(simulation)) as ticket:
            ticket.record_tokens(32)
        told = []
        # Two requests of 42 tokens; the second one's time is after the first one's.
        for digest in (b"a", b"b"):
            with pytest.raises(Exhausted, match="used its 60 tokens a minute") as caught:
                await started(ticket_of(simulation, digest=digest))
            told.append(caught.value.retry_after_seconds)
        await asyncio.sleep(told[0])
        with await started(ticket_of(simulation, digest=b"a")) as ticket:
            ticket.record_tokens(32)
        await asyncio.sleep(told[1] - told[0])
        await started(ticket_of(simulation, digest=b"b"))
        await simulation.close()
        return told[0], told[1]

    first, second = simulate(story)
    assert first == pytest.approx(24.0)
    assert second == pytest.approx(66.0)


def test_tokens_that_were_expected_and_not_generated_are_given_back() -> None:
    async def story() -> None:
        simulation = Simulation(Tenant(name="default", tokens_per_minute=60))
        with await started(ticket_of(simulation)) as ticket:
            ticket.record_tokens(1)
        with await started(ticket_of(simulation)) as ticket:
            assert ticket.status is Status.RUNNING
        await simulation.close()

    simulate(story)


def test_requests_start_as_far_as_the_kv_cache_holds_them() -> None:
    async def story() -> None:
        simulation = Simulation(kv_tokens=100)
        first = await started(ticket_of(simulation))
        await started(ticket_of(simulation))
        third = waiting(ticket_of(simulation))
        await asyncio.sleep(1.0)
        assert not third.done()
        simulation.admission.end(first)
        await third
        await simulation.close()

    simulate(story)


def test_request_larger_than_the_kv_cache_starts_alone() -> None:
    async def story() -> None:
        simulation = Simulation(kv_tokens=20)
        await started(ticket_of(simulation))
        await simulation.close()

    simulate(story)


def test_max_tokens_above_the_tenants_limit_is_refused() -> None:
    async def story() -> None:
        simulation = Simulation(Tenant(name="default", max_tokens=31))
        with pytest.raises(InvalidRequest, match=r"sampling\.max_tokens"):
            ticket_of(simulation)
        await simulation.close()

    simulate(story)


def test_refusals_and_running_requests_are_counted_by_tenant() -> None:
    async def story() -> dict[str, float | None]:
        simulation = Simulation(Tenant(name="default", max_running=1, max_waiting=0))
        first = await started(ticket_of(simulation))
        with pytest.raises(Exhausted):
            await started(ticket_of(simulation))
        value = simulation.metrics.registry.get_sample_value
        tenant = {"tenant": "default"}
        found = {
            "running": value("stitch_tenant_requests_running", tenant),
            "refused": value("stitch_admission_refused_total", {**tenant, "reason": "waiting"}),
        }
        first.record_tokens(5)
        simulation.admission.end(first)
        found["work"] = value("stitch_tenant_work_total", tenant)
        await simulation.close()
        return found

    assert simulate(story) == {"running": 1.0, "refused": 1.0, "work": 15.0}
