"""The requests that wait on a first shard, and which of them is admitted next.

In: requests with tenant, weight and deadline, and what is computed for each tenant. Out: the next request to admit.
Answers that have started, preempted here or replayed after a fault, come first, then tenants by their virtual time, and
within a tenant the earliest deadline. A request whose next shards have no room holds up only those for the same shards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator

from stitch.errors import Exhausted
from stitch.fair_queue import FairQueue
from stitch_server.engine.request import Request

# The last admissions from which the rate of admissions is measured.
MEASURED_ADMISSIONS = 32
# When a refused client should retry: before any admission was measured, and at most.
DEFAULT_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0


class WaitingRequests:
    """Requests without KV blocks. Iteration yields answers that have started, then the others in order of arrival."""

    def __init__(self, max_waiting: int, clock: Callable[[], float]) -> None:
        """Further requests than `max_waiting` are refused, except answers that have started."""
        self._max_waiting = max_waiting
        self._clock = clock
        self._queue: FairQueue[Request] = FairQueue(clock)
        self._resumed: list[Request] = []
        # When the last requests were admitted, since the queue was empty.
        self._admitted_at: deque[float] = deque(maxlen=MEASURED_ADMISSIONS)
        # The time of the last place in the queue that a refused client was told of.
        self._promised = 0.0

    def __len__(self) -> int:
        return len(self._resumed) + len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        yield from self._resumed
        yield from self._queue

    @property
    def has_started_answers(self) -> bool:
        """Whether an answer that has started is among them."""
        return bool(self._resumed)

    @property
    def next_shards(self) -> set[str]:
        """The next shards of the requests that wait."""
        shards = {shard for request in self._resumed for shard in request.next_shards}
        for group in self._queue.nonempty_groups:
            shards.update(group if isinstance(group, tuple) else ())
        return shards

    def add(self, request: Request) -> None:
        """Queues a new request. Raises Exhausted where too many wait, with the time at which a place will be free."""
        if request.generated:
            self._resumed.append(request)
            return
        if len(self) >= self._max_waiting:
            raise Exhausted(f"{len(self)} sessions wait already, which is the limit", self._seconds_to_next_place())
        self._queue.push(
            request,
            request.tenant,
            weight=request.tenant_weight,
            deadline=request.deadline,
            group=request.next_shards,
        )

    def put_back(self, request: Request) -> None:
        """Queues a preempted request before all others."""
        self._resumed.insert(0, request)

    def next(self, before: float, has_room: Callable[[Request], bool]) -> Request | None:
        """The first request with room whose turn comes before `before`; None where there is none."""
        full: set[str] = set()

        def is_open(shards: Hashable) -> bool:
            return isinstance(shards, tuple) and full.isdisjoint(shards)

        for resumed in self._resumed:
            if is_open(resumed.next_shards):
                if has_room(resumed):
                    return resumed
                full.update(resumed.next_shards)
        while (request := self._queue.peek(is_open)) is not None:
            if self.turn_of(request) >= before:
                return None
            if has_room(request):
                return request
            full.update(request.next_shards)
        return None

    def take(self, request: Request) -> None:
        """Removes a request that is admitted."""
        if request in self._queue:
            self._queue.take(request)
        else:
            self._resumed.remove(request)
        if len(self):
            self._admitted_at.append(self._clock())
        else:
            self._admitted_at.clear()

    def remove(self, request: Request) -> None:
        """Drops a request that ended; no effect where it does not wait."""
        if not self._queue.remove(request) and request in self._resumed:
            self._resumed.remove(request)

    def pop_expired(self) -> list[Request]:
        """Removes the requests whose deadline has passed, and returns them."""
        return self._queue.pop_expired()

    def charge(self, request: Request, cost: float) -> None:
        """Counts what is computed for the request's tenant."""
        self._queue.charge(request.tenant, cost)

    def turn_of(self, request: Request) -> float:
        """Requests are served in this order: the virtual time of their tenant, but started answers at once."""
        return -math.inf if request.generated else self.virtual_time(request)

    def virtual_time(self, request: Request) -> float:
        """That of the request's tenant."""
        return self._queue.virtual_time(request.tenant)

    def _seconds_to_next_place(self) -> float:
        """When a place will be free that no other refused client was told of, at the rate of the last admissions."""
        now = self._clock()
        interval = DEFAULT_RETRY_SECONDS
        if self._admitted_at:
            interval = (now - self._admitted_at[0]) / len(self._admitted_at)
        self._promised = min(max(self._promised, now) + interval, now + MAX_RETRY_SECONDS)
        return self._promised - now
