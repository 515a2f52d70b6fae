"""Requests that wait for shards: start-time fair queueing between tenants, earliest deadline first within one.

Every tenant has a virtual time, which grows by (work ÷ weight) of its requests as they start. The next request is that
of the waiting tenant whose virtual time is least; one that has been idle starts at the virtual time of the others, so
that it saves nothing up. Work is in tokens, times the parameters that a route reads for each, as a share of the
costliest route's.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from router_gateway.admission.tenants import Tenant


class Queued(Protocol):
    """What the queue needs to know of a request."""

    @property
    def tenant(self) -> Tenant: ...

    @property
    def rank(self) -> tuple[bool, float]:
        """Its place among its tenant's requests, least first: whether it has no promise, and its deadline."""
        ...

    @property
    def work(self) -> float:
        """What it is expected to take."""
        ...

    @property
    def service_seconds(self) -> float:
        """How long it is expected to run."""
        ...


Item = TypeVar("Item", bound=Queued)


@dataclass(slots=True)
class TenantQueue(Generic[Item]):
    """One tenant's waiting requests, and its virtual time."""

    items: list[Item] = field(default_factory=list)
    virtual_time: float = 0.0


class FairQueue(Generic[Item]):
    """The waiting requests of all tenants."""

    def __init__(self) -> None:
        self._queues: dict[str, TenantQueue[Item]] = {}
        # Of the request that started last.
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return sum(len(queue.items) for queue in self._queues.values())

    def length(self, tenant: str) -> int:
        queue = self._queues.get(tenant)
        return 0 if queue is None else len(queue.items)

    def tenants(self) -> Iterator[Tenant]:
        """Those with a waiting request."""
        return (queue.items[0].tenant for queue in self._queues.values() if queue.items)

    def add(self, item: Item) -> None:
        queue = self._queues.setdefault(item.tenant.name, TenantQueue())
        insort(queue.items, item, key=lambda one: one.rank)

    def remove(self, item: Item) -> None:
        self._queues[item.tenant.name].items.remove(item)

    def pop(self, may_start: Callable[[Item], bool]) -> Item | None:
        """Takes the next request that may start, and adds its work to its tenant's virtual time; None: none may."""
        waiting = [queue for queue in self._queues.values() if queue.items]
        waiting.sort(key=lambda queue: (max(queue.virtual_time, self._virtual_time), queue.items[0].rank))
        for queue in waiting:
            if may_start(queue.items[0]):
                item = queue.items.pop(0)
                self._virtual_time = max(queue.virtual_time, self._virtual_time)
                queue.virtual_time = self._virtual_time + item.work / item.tenant.weight
                return item
        return None

    def correct(self, tenant: Tenant, work: float) -> None:
        """A request took `work` more than expected, or less where it is negative."""
        self._queues[tenant.name].virtual_time += work / tenant.weight

    def seconds_before(self, item: Item) -> float:
        """The running time of its tenant's waiting requests that start before `item`, which may wait or not."""
        queue = self._queues.get(item.tenant.name)
        if queue is None:
            return 0.0
        return sum(one.service_seconds for one in queue.items if one is not item and one.rank <= item.rank)

    def seconds_of_others(self, tenant: str) -> float:
        """The running time of all other tenants' waiting requests."""
        others = (queue.items for name, queue in self._queues.items() if name != tenant)
        return sum(one.service_seconds for items in others for one in items)
