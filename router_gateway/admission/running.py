"""The requests on shards: how many there may be, and each tenant's share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from router_gateway.admission.capacity import Capacity
from router_gateway.admission.forecast import Forecast, Size
from router_gateway.admission.tenants import Tenant
from router_gateway.admission.token_budget import Account

# Requests on one first shard, unless deadlines or the KV cache allow fewer: beside less of them, some would wait for
# whole answers of others instead of sharing the shard with them.
LEAST_RUNNING = 16
# Beyond LEAST_RUNNING, as many run as get each of their tokens within this time: people read no faster, and the first
# token of another tenant's request waits for a pass of theirs.
LONGEST_TOKEN_SECONDS = 0.1
# A deadline that allows fewer running requests than this share of the limit is not kept at the cost of the others.
LEAST_SHARE_FOR_DEADLINE = 0.25
# That of a request that comes back when it was told to is kept, as far as this share of the limit allows.
LEAST_SHARE_FOR_PROMISE = 0.5
# Of the KV cache, what running requests are expected to fill.
KV_SHARE = 0.9


class Placed(Protocol):
    """A request on shards."""

    tenant: Tenant
    size: Size
    # How many may run on its first shard so that it ends in time.
    running_within: float


class Running:
    """The requests on shards."""

    def __init__(
        self,
        accounts: Mapping[str, Account],
        num_waiting: Callable[[str], int],
        forecast: Forecast,
        capacity: Callable[[], Capacity],
        clock: Callable[[], float],
    ) -> None:
        """`num_waiting` of a tenant's name is how many of its requests wait."""
        self._accounts = accounts
        self._num_waiting = num_waiting
        self._forecast = forecast
        self._capacity = capacity
        self._clock = clock
        self._requests: set[Placed] = set()
        # See `limit`, and the same if no running request had a deadline; None: they have to be counted anew.
        self._limits: tuple[int, float] | None = None
        # See `request_seconds`; up to `_summed_at`.
        self._request_seconds = 0.0
        self._summed_at = clock()

    def __len__(self) -> int:
        """The number of requests; one with several answers is as many."""
        return sum(request.size.answers for request in self._requests)

    def add(self, request: Placed) -> None:
        self.request_seconds()
        self._requests.add(request)
        self._accounts[request.tenant.name].running += 1
        self._limits = None

    def remove(self, request: Placed) -> None:
        self.request_seconds()
        self._requests.remove(request)
        self._accounts[request.tenant.name].running -= 1
        self._limits = None

    def request_seconds(self) -> float:
        """Their number summed over time; the difference ÷ seconds is the mean number."""
        now = self._clock()
        self._request_seconds += len(self) * (now - self._summed_at)
        self._summed_at = now
        return self._request_seconds

    def mean_beside(self, since: float, seconds: float) -> float:
        """On each first shard, in the seconds from when `request_seconds` was `since` until now."""
        return (self.request_seconds() - since) / seconds / self._capacity().first_shards

    @property
    def limit(self) -> int:
        """How many requests the shards hold; refusals, of which there may be many, don't count it anew."""
        return self._counted()[0]

    def least_beside_promise(self) -> float:
        """How many run on each first shard beside a request that comes back at its time, however tight its deadline."""
        return LEAST_SHARE_FOR_PROMISE * self._counted()[1] / self._capacity().first_shards

    def forget_limit(self) -> None:
        """Shards may have come or gone."""
        self._limits = None

    def limit_per_shard(self) -> float:
        """Of each first shard."""
        return self.limit / self._capacity().first_shards

    def per_shard_with(self, others: int) -> float:
        """How many will run on each first shard when that many more have come."""
        return min(self.limit, len(self) + others) / self._capacity().first_shards

    def has_room(self, tenant: Tenant) -> bool:
        """Whether one more request of the tenant may run, as far as their number goes."""
        running = self._accounts[tenant.name].running
        if tenant.max_running is not None and running >= tenant.max_running:
            return False
        return len(self) < self.limit or self.is_owed(tenant)

    def is_owed(self, tenant: Tenant) -> bool:
        """Whether it runs less than half of its share of what the shards hold; others may then run beyond theirs."""
        running, limit = self._accounts[tenant.name].running, self.limit
        return running < self.share(tenant) * limit / 2 and len(self) < 2 * limit

    def fits_kv(self, request: Placed) -> bool:
        """Whether it fits the KV cache beside the others."""
        held = sum(one.size.tokens for one in self._requests)
        room = self._capacity().kv_tokens
        return not held or not room or held + request.size.tokens <= room

    def share(self, tenant: Tenant) -> float:
        """The tenant's share of the shards among those that have requests."""
        weights = (one.tenant.weight for one in self._active_accounts() if one.tenant.name != tenant.name)
        return tenant.weight / (tenant.weight + sum(weights))

    def slots(self, tenant: Tenant) -> int:
        """How many requests of a tenant may run while no other has any."""
        return self.limit if tenant.max_running is None else min(self.limit, tenant.max_running)

    def shared_slots(self, tenant: Tenant) -> float:
        """How many of its requests may run beside those of the others."""
        return min(self.slots(tenant), self.share(tenant) * self.limit)

    def _active_accounts(self) -> Iterator[Account]:
        return (one for one in self._accounts.values() if one.running or self._num_waiting(one.tenant.name))

    def _counted(self) -> tuple[int, float]:
        if self._limits is None:
            most, shards = self._count_limit(), self._capacity().first_shards
            within = (shards * one.running_within for one in self._requests)
            kept = (one for one in within if LEAST_SHARE_FOR_DEADLINE * most <= one < most)
            self._limits = max(1, int(min(kept, default=most))), most
        return self._limits

    def _count_limit(self) -> float:
        """As many as get their tokens fast and fit the KV cache."""
        capacity = self._capacity()
        fast = self._forecast.decode.running_within(LONGEST_TOKEN_SECONDS)
        limit = capacity.first_shards * max(LEAST_RUNNING, fast or 0.0)
        if capacity.kv_tokens and self._forecast.mean_tokens:
            limit = min(limit, KV_SHARE * capacity.kv_tokens / self._forecast.mean_tokens)
        return limit
