"""Fairness between tenants, deadlines within one, and bounded memory of the fair queue."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch.fair_queue import LATEST_DUE_SECONDS, SPARE_ENTRIES, FairQueue
from tests.support.engine_fakes import ManualClock

tenants = st.sampled_from(["one", "two", "three"])


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(0.0)


@pytest.fixture
def queue(clock: ManualClock) -> FairQueue[str]:
    return FairQueue(clock)


def serve(queue: FairQueue[str], cost: float = 1.0) -> str:
    """Takes the next item, whose name begins with its tenant's, and charges the tenant."""
    item = queue.pop()
    assert item is not None
    queue.charge(item.partition("-")[0], cost)
    return item


def fill(queue: FairQueue[str], tenant: str, count: int, weight: float = 1.0) -> None:
    for number in range(count):
        queue.push(f"{tenant}-{number}", tenant, weight=weight)


class TestFairness:
    def test_tenant_with_few_items_does_not_wait_for_many_of_another(self, queue: FairQueue[str]) -> None:
        fill(queue, "a", 300)
        for _ in range(10):
            serve(queue)
        queue.push("b-0", "b")
        assert "b-0" in [serve(queue), serve(queue)]

    @given(seed=st.integers(0, 10_000), weight=st.sampled_from([1.0, 3.0, 10.0]))
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    def test_cost_of_tenants_that_wait_is_in_proportion_to_weights(self, seed: int, weight: float) -> None:
        draw, queue, spent = random.Random(seed), FairQueue[str](ManualClock()), Counter[str]()
        fill(queue, "a", 2000)
        fill(queue, "b", 2000, weight)
        for _ in range(1500):
            item = queue.pop()
            assert item is not None
            cost = draw.uniform(0.5, 2.0)
            queue.charge(item[0], cost)
            spent[item[0]] += cost
        assert spent["b"] / spent["a"] == pytest.approx(weight, rel=0.1)

    def test_costlier_items_get_fewer_turns(self, queue: FairQueue[str]) -> None:
        fill(queue, "a", 100)
        fill(queue, "b", 100)
        turns = Counter[str]()
        for _ in range(80):
            item = queue.pop()
            assert item is not None
            turns[item[0]] += 1
            queue.charge(item[0], 3.0 if item[0] == "b" else 1.0)
        assert turns == {"a": 60, "b": 20}

    def test_idle_tenant_earns_no_credit(self, queue: FairQueue[str]) -> None:
        queue.push("b-0", "b")
        serve(queue)
        fill(queue, "a", 100)
        for _ in range(50):
            serve(queue)
        for number in range(1, 50):
            queue.push(f"b-{number}", "b")
        assert Counter(serve(queue)[0] for _ in range(20)) == {"a": 10, "b": 10}

    def test_service_without_a_queue_is_no_debt(self, queue: FairQueue[str]) -> None:
        for _ in range(1000):
            queue.charge("a", 1.0)
        fill(queue, "a", 10)
        fill(queue, "b", 10)
        assert Counter(serve(queue)[0] for _ in range(10)) == {"a": 5, "b": 5}

    def test_service_after_admission_counts(self, queue: FairQueue[str]) -> None:
        fill(queue, "a", 10)
        fill(queue, "b", 10)
        serve(queue)
        serve(queue)
        queue.charge("a", 3.0)
        assert [serve(queue)[0] for _ in range(4)] == ["b", "b", "b", "a"]

    def test_costlier_work_than_charged_is_charged_later_and_less_is_taken_off(self, queue: FairQueue[str]) -> None:
        fill(queue, "a", 20)
        fill(queue, "b", 20)
        serve(queue, cost=5.0)
        queue.charge("a", -3.0)
        assert [serve(queue)[0] for _ in range(8)] == ["b"] * 5 + ["a"] * 3

    def test_tenant_that_waits_keeps_its_turn_while_it_is_passed_over(self, queue: FairQueue[str]) -> None:
        for tenant in "ab":
            for number in range(20):
                queue.push(f"{tenant}-{number}", tenant, group=tenant)
        for _ in range(5):
            item = queue.pop(lambda group: group == "b")
            assert item is not None
            queue.charge("b", 1.0)
        assert [serve(queue)[0] for _ in range(7)] == ["a"] * 6 + ["b"]


class TestWithinATenant:
    def test_first_items_precede_earlier_deadlines(self, queue: FairQueue[str]) -> None:
        queue.push("early", deadline=1.0)
        queue.push("first", deadline=50.0, is_first=True)
        assert [queue.pop(), queue.pop()] == ["first", "early"]

    def test_seconds_before_a_new_item_are_of_earlier_deadlines(self, queue: FairQueue[str]) -> None:
        for number in range(5):
            queue.push(f"a-{number}", "a", deadline=float(number), seconds=2.0, group=number % 2)
        queue.push("b-0", "b", seconds=7.0)
        queue.remove("a-1")
        assert queue.seconds_before("a", 2.5) == 4.0
        assert queue.seconds_before("a", 2.5, is_first=True) == 0.0
        assert queue.seconds_before("c") == 0.0
        assert (queue.seconds_of_others("a"), queue.seconds_of_others("b"), queue.length("a")) == (7.0, 8.0, 4)

    def test_earliest_deadline_is_first(self, queue: FairQueue[str]) -> None:
        for item, deadline in ("late", 50.0), ("early", 10.0), ("middle", 20.0):
            queue.push(item, deadline=deadline)
        assert [queue.pop(), queue.pop(), queue.pop()] == ["early", "middle", "late"]

    def test_equal_deadlines_keep_their_order(self, queue: FairQueue[str]) -> None:
        for item in "first", "second", "third":
            queue.push(item, deadline=10.0)
        assert [queue.pop(), queue.pop(), queue.pop()] == ["first", "second", "third"]

    @pytest.mark.parametrize("deadline", [None, 600.0])
    def test_item_without_urgent_deadline_is_last_but_is_not_put_off_for_ever(
        self, queue: FairQueue[str], clock: ManualClock, deadline: float | None
    ) -> None:
        queue.push("patient", deadline=deadline)
        for number in range(20):
            queue.push(f"urgent-{number}", deadline=clock.now + 10.0)
            served = queue.pop()
            if served == "patient":
                break
            clock.advance(LATEST_DUE_SECONDS / 10)
            queue.push(f"more-{number}", deadline=clock.now + 10.0)
        assert "patient" not in queue
        assert clock.now >= LATEST_DUE_SECONDS / 2

    def test_expired_items_are_removed(self, queue: FairQueue[str], clock: ManualClock) -> None:
        queue.push("late", "a", deadline=10.0)
        queue.push("early", "b", deadline=5.0)
        queue.push("never", "b")
        assert queue.pop_expired() == []
        clock.advance(5.0)
        assert queue.pop_expired() == ["early"]
        assert list(queue) == ["late", "never"]
        clock.advance(1000.0)
        assert queue.pop_expired() == ["late"]
        assert queue.pop() == "never"


class TestGroups:
    def test_closed_group_is_passed_over(self, queue: FairQueue[str]) -> None:
        queue.push("first", "a", group="full")
        queue.push("second", "a", group="free")
        assert queue.peek(lambda group: group != "full") == "second"
        assert queue.peek() == "first"

    def test_virtual_time_counts_over_all_groups(self, queue: FairQueue[str]) -> None:
        queue.push("a-0", "a", group="x")
        queue.push("a-1", "a", group="y")
        queue.push("b-0", "b", group="y")
        assert serve(queue) == "a-0"
        assert serve(queue) == "b-0"

    def test_group_is_empty_once_its_items_left(self, queue: FairQueue[str]) -> None:
        queue.push("one", group="x")
        assert queue.nonempty_groups == ["x"]
        queue.remove("one")
        assert queue.nonempty_groups == []
        assert queue.peek() is None


class TestRemoval:
    def test_removed_item_is_not_served(self, queue: FairQueue[str]) -> None:
        queue.push("one", "a")
        queue.push("two", "a")
        assert queue.remove("one")
        assert not queue.remove("one")
        assert ("one" in queue, len(queue)) == (False, 1)
        assert [queue.pop(), queue.pop()] == ["two", None]

    def test_items_that_left_take_no_memory(self, queue: FairQueue[str]) -> None:
        queue.push("stays", "a", deadline=1.0, group="x")
        for number in range(2000):
            queue.push(f"goes-{number}", "a", deadline=100.0, group="x")
            queue.remove(f"goes-{number}")
        assert len(queue._deadlines) <= SPARE_ENTRIES + 3
        assert len(queue._flows["a", "x"].due) <= SPARE_ENTRIES + 3

    def test_idle_tenants_take_no_memory(self, queue: FairQueue[str]) -> None:
        for number in range(2000):
            queue.push("item", f"tenant {number}")
            queue.pop()
        assert len(queue._accounts) <= 2 * SPARE_ENTRIES
        assert queue.peek() is None
        assert (len(queue._flows), len(queue._flow_order)) == (0, 0)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_queue_serves_every_item_once_and_is_never_idle(data: st.DataObject) -> None:
    clock = ManualClock(0.0)
    queue, waiting = FairQueue[str](clock), dict[str, float | None]()
    for number in range(data.draw(st.integers(1, 60))):
        clock.advance(data.draw(st.sampled_from([0.0, 1.0])))
        match data.draw(st.sampled_from(["push", "push", "pop", "remove", "charge", "expire"])):
            case "push":
                item, deadline = f"item {number}", data.draw(st.none() | st.floats(0.0, 100.0))
                group = data.draw(st.sampled_from("xy"))
                queue.push(item, data.draw(tenants), weight=2.0, deadline=deadline, group=group)
                waiting[item] = deadline
            case "pop":
                served = queue.pop()
                assert (served is None) == (not waiting)
                if served is not None:
                    del waiting[served]
            case "remove" if waiting:
                gone = data.draw(st.sampled_from(sorted(waiting)))
                assert queue.remove(gone)
                del waiting[gone]
            case "charge":
                queue.charge(data.draw(tenants), data.draw(st.floats(0.0, 5.0)))
            case "expire":
                for item in queue.pop_expired():
                    deadline = waiting.pop(item)
                    assert deadline is not None
                    assert deadline <= clock.now
                assert all(one is None or one > clock.now for one in waiting.values())
        assert list(queue) == list(waiting)
