"""Tests of the queue between tenants: whose request starts next, and how much waits before one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from router_gateway.admission.fair_queue import FairQueue
from router_gateway.admission.tenants import Tenant

BLUE, RED = Tenant(name="blue"), Tenant(name="red", weight=3)


@dataclass(eq=False)
class Item:
    tenant: Tenant
    deadline: float = 0.0
    work: float = 1.0
    promised: bool = False
    service_seconds: float = 2.0

    @property
    def rank(self) -> tuple[bool, float]:
        return not self.promised, self.deadline


@pytest.fixture
def queue() -> FairQueue[Item]:
    return FairQueue()


def fill(queue: FairQueue[Item], tenant: Tenant, count: int, work: float = 1.0) -> None:
    for index in range(count):
        queue.add(Item(tenant, float(index), work))


def take(queue: FairQueue[Item], count: int) -> Counter[str]:
    items = [queue.pop(lambda item: True) for _ in range(count)]
    return Counter(item.tenant.name for item in items if item is not None)


def test_work_is_shared_by_weight(queue: FairQueue[Item]) -> None:
    fill(queue, BLUE, 100)
    fill(queue, RED, 100)
    assert take(queue, 80) == {"blue": 20, "red": 60}


def test_costlier_requests_start_less_often(queue: FairQueue[Item]) -> None:
    fill(queue, BLUE, 100, work=1)
    fill(queue, Tenant(name="green"), 100, work=4)
    assert take(queue, 50) == {"blue": 40, "green": 10}


def test_idle_tenant_saves_nothing_up(queue: FairQueue[Item]) -> None:
    fill(queue, BLUE, 100)
    take(queue, 50)
    fill(queue, Tenant(name="green"), 100)
    assert take(queue, 20) == {"blue": 9, "green": 11}


def test_work_beyond_what_was_expected_delays_the_next_requests(queue: FairQueue[Item]) -> None:
    fill(queue, BLUE, 100)
    fill(queue, Tenant(name="green"), 100)
    take(queue, 2)
    queue.correct(BLUE, 10.0)
    assert take(queue, 11) == {"green": 10, "blue": 1}


def test_requests_of_a_tenant_start_by_promise_then_by_deadline(queue: FairQueue[Item]) -> None:
    for deadline, promised in ((3.0, False), (1.0, False), (9.0, True), (2.0, False)):
        queue.add(Item(BLUE, deadline, promised=promised))
    started = [queue.pop(lambda item: True) for _ in range(4)]
    assert [item.deadline for item in started if item is not None] == [9.0, 1.0, 2.0, 3.0]


def test_request_that_may_not_start_lets_other_tenants_pass(queue: FairQueue[Item]) -> None:
    fill(queue, BLUE, 2)
    fill(queue, RED, 2)
    item = queue.pop(lambda item: item.tenant is RED)
    assert item is not None
    assert item.tenant is RED
    assert queue.pop(lambda item: False) is None
    assert (len(queue), queue.length("blue"), queue.length("none")) == (3, 2, 0)


def test_removed_request_does_not_start(queue: FairQueue[Item]) -> None:
    item = Item(BLUE)
    queue.add(item)
    queue.remove(item)
    assert queue.pop(lambda item: True) is None
    assert list(queue.tenants()) == []


def test_seconds_before_a_request_are_of_earlier_deadlines(queue: FairQueue[Item]) -> None:
    fill(queue, BLUE, 5)
    fill(queue, RED, 3)
    assert queue.seconds_before(Item(BLUE, 2.5)) == 6.0
    assert queue.seconds_before(Item(BLUE, 2.5, promised=True)) == 0.0
    assert queue.seconds_before(Item(Tenant(name="green"))) == 0.0
    assert queue.seconds_of_others("blue") == 6.0
