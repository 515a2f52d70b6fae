"""A queue that is fair between tenants, and serves the earliest deadline first within a tenant.

In: items, each with its tenant, and the cost of what is done for a tenant. Out: the item that is next. Every tenant has
a virtual time, which its cost advances by cost / weight, and the tenant with the least is next: tenants that wait all
the time get cost in proportion to their weights. Invariants: no item waits for another tenant's turn while nobody else
waits (work-conserving), and a tenant earns no credit while nothing of it is queued.

Each operation takes a time that is logarithmic in the number of items, except `seconds_before`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

# The latest deadline, in seconds after its arrival, by which an item is ordered within its tenant: one without a
# deadline or with a late one comes after urgent ones, and new ones do not overtake it for ever.
LATEST_DUE_SECONDS = 60.0
# A heap is rebuilt where its entries exceed twice the number of items by more than this: most of them left the queue.
SPARE_ENTRIES = 64

Item = TypeVar("Item", bound=Hashable)
Group = Hashable


@dataclass(slots=True, eq=False)
class _Account:
    """What one tenant has been charged."""

    virtual_time: float
    weight: float = 1.0
    num_queued: int = 0
    # How long its items are expected to run.
    queued_seconds: float = 0.0
    # What it was charged too much, at most 0; its next charges are less by it.
    excess: float = 0.0


@dataclass(slots=True, eq=False)
class _Entry(Generic[Item]):
    """One item; `item` is None once it has left the queue."""

    item: Item | None
    flow: _Flow[Item]
    seconds: float


# When an item is due in seconds, and the number of its arrival, by which heaps sort it.
_Due = tuple[float, int, _Entry[Item]]


@dataclass(slots=True, eq=False)
class _Flow(Generic[Item]):
    """The items of one tenant in one group."""

    tenant: str
    group: Group
    due: list[_Due[Item]] = field(default_factory=list)

    def prune(self) -> bool:
        """Drops entries at the front that have left the queue; returns whether an item remains."""
        while self.due and self.due[0][2].item is None:
            heappop(self.due)
        return bool(self.due)


class FairQueue(Generic[Item]):
    """Items of tenants, optionally in groups of which some may be closed for a while.

    Iteration yields the items in order of arrival.
    """

    def __init__(self, clock: Callable[[], float], latest_due_seconds: float = LATEST_DUE_SECONDS) -> None:
        """`clock` is in seconds, like the deadlines."""
        self._clock = clock
        self._latest_due_seconds = latest_due_seconds
        self._numbers = itertools.count()
        self._entries: dict[Item, _Entry[Item]] = {}
        self._accounts: dict[str, _Account] = {}
        self._max_accounts = SPARE_ENTRIES
        self._flows: dict[tuple[str, Group], _Flow[Item]] = {}
        # The flows of each group, sorted by a virtual time of their tenant that may have passed since.
        self._flow_order: dict[Group, list[tuple[float, int, _Flow[Item]]]] = {}
        self._deadlines: list[_Due[Item]] = []
        # Where a tenant begins that had nothing in the queue: the virtual time of the tenant that was served last.
        self._virtual_now = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: Item) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[Item]:
        return iter(self._entries)

    def push(
        self,
        item: Item,
        tenant: str = "",
        *,
        weight: float = 1.0,
        deadline: float | None = None,
        group: Group = None,
        is_first: bool = False,
        seconds: float = 0.0,
    ) -> None:
        """Queues an item. `weight` is positive, and the tenant's from now on; `deadline` in seconds of the clock.

        `is_first`: it comes before its tenant's other items, whatever their deadlines; `seconds`: how long it is
        expected to run.
        """
        account = self._account(tenant)
        account.weight = weight
        if not account.num_queued:
            account.virtual_time = max(account.virtual_time, self._virtual_now)
        account.num_queued += 1
        account.queued_seconds += seconds
        flow = self._flows.get((tenant, group))
        if flow is None:
            flow = self._flows[tenant, group] = _Flow(tenant, group)
            place = account.virtual_time, next(self._numbers), flow
            heappush(self._flow_order.setdefault(group, []), place)
        entry, number = _Entry(item, flow, seconds), next(self._numbers)
        self._entries[item] = entry
        heappush(flow.due, (self._due(deadline, is_first), number, entry))
        if deadline is not None:
            heappush(self._deadlines, (deadline, number, entry))

    def peek(self, is_open: Callable[[Group], bool] = lambda group: True) -> Item | None:
        """The next item of all open groups; None where they have none."""
        flows = [flow for group in list(self._flow_order) if is_open(group) and (flow := self._next_flow(group))]
        return min(flows, key=self._place).due[0][2].item if flows else None

    def take(self, item: Item) -> None:
        """Removes an item whose turn it is: tenants that come later begin at the virtual time of its tenant."""
        self._virtual_now = max(self._virtual_now, self.virtual_time(self._entries[item].flow.tenant))
        self.remove(item)

    def pop(self, is_open: Callable[[Group], bool] = lambda group: True) -> Item | None:
        """Takes the next item of all open groups; None where they have none."""
        item = self.peek(is_open)
        if item is not None:
            self.take(item)
        return item

    def remove(self, item: Item) -> bool:
        """Drops an item; False where it is not queued."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        entry.item = None
        account = self._accounts[entry.flow.tenant]
        account.num_queued -= 1
        account.queued_seconds = account.queued_seconds - entry.seconds if account.num_queued else 0.0
        self._compact(entry.flow.due)
        self._compact(self._deadlines)
        return True

    def pop_expired(self) -> list[Item]:
        """Removes the items whose deadline has passed, and returns them."""
        now, expired = self._clock(), []
        while self._deadlines and (self._deadlines[0][2].item is None or self._deadlines[0][0] <= now):
            item = heappop(self._deadlines)[2].item
            if item is not None:
                self.remove(item)
                expired.append(item)
        return expired

    @property
    def nonempty_groups(self) -> list[Group]:
        """The groups that have an item."""
        return [group for group in list(self._flow_order) if self._next_flow(group)]

    def charge(self, tenant: str, cost: float) -> None:
        """Counts what was done for a tenant. A negative `cost` is what was charged too much before.

        While nothing is queued it takes nothing from others, so that only the last charge counts later.
        """
        account = self._account(tenant)
        if not self._entries:
            self._virtual_now = max(self._virtual_now, account.virtual_time)
        due = cost + account.excess
        account.excess = min(due, 0.0)
        account.virtual_time += max(due, 0.0) / account.weight

    def virtual_time(self, tenant: str) -> float:
        """The tenant's virtual time; of tenants with items, the one with the least is next."""
        account = self._accounts.get(tenant)
        return self._virtual_now if account is None else account.virtual_time

    def length(self, tenant: str) -> int:
        """The number of the tenant's items."""
        account = self._accounts.get(tenant)
        return 0 if account is None else account.num_queued

    def seconds_before(self, tenant: str, deadline: float | None = None, is_first: bool = False) -> float:
        """How long those of the tenant's items are expected to run that come before a new one."""
        due = self._due(deadline, is_first)
        flows = (flow for (name, _), flow in self._flows.items() if name == tenant)
        return sum(entry.seconds for flow in flows for at, _, entry in flow.due if entry.item is not None and at <= due)

    def seconds_of_others(self, tenant: str) -> float:
        """How long the items of all other tenants are expected to run."""
        return sum(account.queued_seconds for name, account in self._accounts.items() if name != tenant)

    def _due(self, deadline: float | None, is_first: bool) -> float:
        """By which an item that is queued now is ordered within its tenant."""
        latest = self._clock() + self._latest_due_seconds
        return -math.inf if is_first else latest if deadline is None else min(deadline, latest)

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._max_accounts:
                self._forget_idle_accounts()
            account = self._accounts[tenant] = _Account(self._virtual_now)
        return account

    def _forget_idle_accounts(self) -> None:
        """Drops the accounts that equal a new one."""
        for tenant, account in list(self._accounts.items()):
            if not account.num_queued and account.virtual_time <= self._virtual_now:
                del self._accounts[tenant]
        self._max_accounts = 2 * len(self._accounts) + SPARE_ENTRIES

    def _place(self, flow: _Flow[Item]) -> tuple[float, float, int]:
        """The order of the flows of several groups."""
        due, number, _ = flow.due[0]
        return self._accounts[flow.tenant].virtual_time, due, number

    def _next_flow(self, group: Group) -> _Flow[Item] | None:
        """The flow of the group's next item, which is at its front."""
        order = self._flow_order.get(group)
        while order:
            virtual_time, number, flow = order[0]
            if not flow.prune():
                heappop(order)
                del self._flows[flow.tenant, group]
            elif virtual_time < (current := self._accounts[flow.tenant].virtual_time):
                heapreplace(order, (current, number, flow))
            else:
                return flow
        self._flow_order.pop(group, None)
        return None

    def _compact(self, due: list[_Due[Item]]) -> None:
        """Rebuilds a heap without the entries that left the queue, where these are most of it."""
        if len(due) > 2 * len(self._entries) + SPARE_ENTRIES:
            due[:] = [one for one in due if one[2].item is not None]
            heapify(due)
