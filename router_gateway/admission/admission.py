"""The one way in for requests of every protocol: `admit(credentials, demand)`.

In go what a caller shows of itself and what it asks for, out comes a `Ticket`, or the error that refuses it. A ticket
whose text is tokenized `start`s: it waits until the shards have room for it. Shards hold as many requests as let others
begin soon and the running ones end in time; the rest waits here, in the order of `FairQueue`, which counts tokens times
the parameters that a route reads for each. What can't end by its deadline is refused at once, with a time for which
room is kept.

Invariant: a ticket whose block has ended holds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from types import TracebackType
from typing import Self

from router_gateway.admission.capacity import Capacity
from router_gateway.admission.forecast import Forecast, Size
from router_gateway.admission.promises import Promise, Promises
from router_gateway.admission.running import Running
from router_gateway.admission.tenants import Credentials, Tenant, Tenants
from router_gateway.admission.token_budget import Account
from router_gateway.metrics import Metrics
from stitch.cluster import GatewayConfig
from stitch.errors import Exhausted, Expired
from stitch.fair_queue import FairQueue

# Of the room for a tenant's requests, what is promised to those that were refused.
PROMISED_SHARE = 0.75
# How often the wait is lengthened by the requests that come back meanwhile.
RETURN_ROUNDS = 3
LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS = 0.25, 3600.0
# How often promises lapse, and the shards' room is looked at without any event.
TICK_SECONDS = 0.25
# The time for one token is learned when an answer ends with at least the first number of tokens, and when a longer one
# has the second number.
LEAST_DECODED_TOKENS, EARLY_DECODED_TOKENS = 4, 16


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for, as far as it is known before its text is tokenized."""

    # The most tokens of its answer; None: what its tenant may have.
    max_tokens: int | None
    # The route that it names; None: the router decides.
    route: str | None
    # When its client stops waiting, in seconds of the clock; None: the client set no deadline.
    deadline: float | None
    # A digest of its input and parameters, by which it is recognized when it comes back.
    digest: Callable[[], bytes]
    # Each of `max_tokens`; they run as that many requests.
    answers: int = 1


class Status(Enum):
    """Where a ticket is in its life."""

    ADMITTED = auto()
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class Admission:
    """Admits the requests of all tenants; every method runs in the event loop."""

    def __init__(
        self,
        tenants: Tenants,
        config: GatewayConfig,
        forecast: Forecast,
        capacity: Callable[[], Capacity],
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._tenants = tenants
        self._config = config
        self._forecast = forecast
        self._metrics = metrics
        self.clock = clock
        self._queue: FairQueue[Ticket] = FairQueue(clock)
        # Of the tenants that have sent a request, by name.
        self._accounts: dict[str, Account] = {}
        self._promises = Promises()
        self.running = Running(self._accounts, self._queue.length, forecast, capacity, clock)
        metrics.add_tenants(tenants.names)

    def authenticate(self, credentials: Credentials) -> Tenant:
        """The tenant of a call that computes nothing. Raises Unauthenticated."""
        return self._tenants.authenticate(credentials)

    def admit(self, credentials: Credentials, demand: Demand) -> Ticket:
        """A ticket for one request.

        Raises Unauthenticated, Forbidden or InvalidRequest, and Exhausted where it can't end in time, however short its
        text is.
        """
        tenant = self._tenants.authenticate(credentials)
        tenant.check_route(demand.route)
        if demand.max_tokens is not None:
            tenant.check_max_tokens(demand.max_tokens)
        now = self.clock()
        deadline = now + self._config.default_deadline_seconds if demand.deadline is None else demand.deadline
        max_tokens = demand.max_tokens or tenant.max_tokens or 1
        promise = self._promises.redeem(tenant.name, demand.digest(), now) if len(self._promises) else None
        ticket = Ticket(self, tenant, demand, deadline, promise)
        self._open_account(tenant)
        ticket.resize(self._forecast.size(tenant.name, "", 0, max_tokens, is_exact=False, answers=demand.answers))
        if not self._starts_now(ticket):
            self._check(ticket, self._forecast.seconds(ticket.size, self._running_beside(ticket)))
        return ticket

    async def keep_promises(self) -> None:
        """Lets promises lapse, and starts requests for which shards have found room; never returns."""
        while True:
            lapsed = self._promises.lapse(self.clock())
            self._metrics.admission_returns.labels(outcome="absent").inc(lapsed)
            self.running.forget_limit()
            self._metrics.admission_limit.set(self.running.limit)
            self.start_waiting()
            await asyncio.sleep(TICK_SECONDS)

    # What tickets call.

    def enqueue(self, ticket: Ticket) -> None:
        """Starts the ticket or lets it wait. Raises Exhausted where it would be too late."""
        tenant = ticket.tenant
        self._check_budget(ticket)
        if not self._starts_now(ticket):
            # A promise was made by what is expected, which the bound exceeds; and the bound is learned from tenants
            # whose requests wait for one another on the first shard.
            is_preferred = ticket.promise is not None or self.running.is_owed(tenant)
            seconds = self._forecast.seconds if is_preferred else self._forecast.bound_seconds
            self._check(ticket, seconds(ticket.size, self._running_beside(ticket)))
        self._queue.push(
            ticket,
            tenant.name,
            weight=tenant.weight,
            deadline=ticket.deadline,
            group=tenant.name,
            is_first=ticket.promise is not None,
            seconds=ticket.service_seconds,
        )
        ticket.status = Status.WAITING
        self.start_waiting()
        self._show(tenant)

    def start_waiting(self) -> None:
        """Starts as many waiting requests as may run now."""
        while (ticket := self._next()) is not None:
            self._queue.take(ticket)
            self._show(ticket.tenant)
            if ticket.is_abandoned:
                ticket.status = Status.ENDED
                continue
            try:
                self._check_in_time(ticket)
            except (Exhausted, Expired) as error:
                ticket.release(error)
            else:
                self._start(ticket)

    def end(self, ticket: Ticket) -> None:
        """Frees what the ticket holds, and learns from it."""
        if ticket.status is Status.WAITING:
            self._queue.remove(ticket)
        elif ticket.status is Status.RUNNING:
            self._end_running(ticket)
            self.start_waiting()
        ticket.status = Status.ENDED
        self._show(ticket.tenant)

    def refuse(self, ticket: Ticket, refused: Exhausted) -> Exhausted:
        """The error for a request that the shards had no room for, against what was expected."""
        return self._refusal(ticket, "shards", str(refused), refused.retry_after_seconds)

    def size(self, tenant: str, route: str, prompt_tokens: int, max_tokens: int, is_exact: bool, answers: int) -> Size:
        """See `Forecast.size`."""
        return self._forecast.size(tenant, route, prompt_tokens, max_tokens, is_exact, answers)

    def service_seconds(self, size: Size) -> float:
        """How long such a request runs in the mean while the shards are full."""
        return self._forecast.seconds(size, self.running.limit_per_shard())

    def learn_decode(self, ticket: Ticket) -> None:
        """Learns from the time that the ticket's tokens took after the first ones."""
        tokens, now = ticket.tokens / ticket.size.answers, self.clock()
        if tokens < LEAST_DECODED_TOKENS or ticket.first_token_at is None or ticket.first_token_at == now:
            return
        seconds = now - ticket.first_token_at
        running = self.running.mean_beside(ticket.request_seconds_at_first, seconds)
        self._forecast.decode.observe(running, seconds / (tokens - 1), now)

    # Who is next.

    def _next(self) -> Ticket | None:
        """The waiting request that starts now; one that doesn't fit the KV cache is waited for."""
        if not len(self._queue):
            return None
        ticket = self._queue.peek(lambda name: self.running.has_room(self._accounts[str(name)].tenant))
        return ticket if ticket is not None and self.running.fits_kv(ticket) else None

    def _may_start(self, ticket: Ticket) -> bool:
        return self.running.has_room(ticket.tenant) and self.running.fits_kv(ticket)

    def _starts_now(self, ticket: Ticket) -> bool:
        return not self._queue.length(ticket.tenant.name) and self._may_start(ticket) and self._is_calm()

    def _is_calm(self) -> bool:
        """Whether so little runs that a request which can't end in time takes nothing from others."""
        return not len(self._queue) and len(self.running) <= self.running.limit / 2

    # What is refused.

    def _check(self, ticket: Ticket, seconds: float) -> None:
        """Raises Exhausted where the ticket would wait too long to end in time, running for that many seconds."""
        tenant, most_wait, now = ticket.tenant, self._config.max_queue_seconds, self.clock()
        waiting, wait = self._queue.length(tenant.name), self.wait_seconds(ticket)
        late = now + wait + seconds - ticket.deadline
        if late > 0:
            why = f"the answer would come {late:.1f} s after the request's deadline"
            raise self._refusal(ticket, "deadline", why, late)
        if ticket.promise is not None:
            return
        if wait > most_wait:
            why = f"requests wait {wait:.0f} s for shards, and {most_wait:g} s is the limit"
            raise self._refusal(ticket, "queue", why, wait - most_wait)
        if tenant.max_waiting is not None and waiting >= tenant.max_waiting:
            why = f"{waiting} requests of tenant {tenant.name} wait already, which is its limit"
            raise self._refusal(ticket, "waiting", why, self._slot_seconds(ticket))

    def _check_budget(self, ticket: Ticket) -> None:
        """Raises Exhausted where the tenant has used its tokens; those that were promised to others are not free."""
        tenant, limit, now = ticket.tenant, ticket.tenant.tokens_per_minute, self.clock()
        if limit is None:
            return
        tokens = min(ticket.size.tokens, limit)
        promised = 0.0 if ticket.promise is not None else self._promises.tokens(tenant.name)
        seconds = self._accounts[tenant.name].budget.seconds_until(tokens + promised, limit, now)
        # The promise was of expected tokens, and others may have taken some more.
        if seconds > (ticket.size.tokens * 60 / limit if ticket.promise else 0.0):
            why = f"tenant {tenant.name} has used its {limit:,} tokens a minute"
            raise self._refusal(ticket, "rate", why, seconds, is_after_promises=True)

    def _check_in_time(self, ticket: Ticket) -> None:
        """Raises Expired or Exhausted where a request that has waited can't end in time any more."""
        left = ticket.deadline - self.clock()
        if left <= 0:
            raise Expired("the deadline passed while the request waited for shards")
        late = self._forecast.seconds(ticket.size, self._running_beside(ticket)) - left
        if late > 0 and not self._is_calm():
            raise self._refusal(
                ticket, "late", f"the answer would come {late:.1f} s after the request's deadline", late
            )

    def wait_seconds(self, ticket: Ticket) -> float:
        """Until the ticket would run: its tenant's earlier requests at its share, or all that wait, if that is less."""
        before = self._queue.seconds_before(ticket.tenant.name, ticket.deadline, ticket.promise is not None)
        if not before and self._may_start(ticket):
            return 0.0
        tenant, running = ticket.tenant, self.running
        others = self._queue.seconds_of_others(tenant.name)
        waiting = min(
            before / running.shared_slots(tenant), (before + others) / running.slots(tenant)
        ) + self._slot_seconds(ticket)
        if ticket.promise is not None:
            return waiting
        wait, now = waiting, self.clock()
        for _ in range(RETURN_ROUNDS):
            # Those that come back while it waits start before it.
            wait = waiting + self._promises.seconds_due(tenant.name, now + wait) / running.shared_slots(tenant)
        return wait

    def expected_wait(self, ticket: Ticket) -> tuple[float, float]:
        """See `Ticket.expected_wait`; the second is 0 where cheaper routes are no way out."""
        seconds = self.wait_seconds(ticket)
        if not seconds or not self._config.cheaper_under_load:
            return seconds, 0.0
        left = ticket.deadline - self.clock() - self._forecast.seconds(ticket.size, self._running_beside(ticket))
        most = min(left, self._config.max_queue_seconds)
        return seconds, min(1.0, seconds / most) if most > 0 else 1.0

    def _slot_seconds(self, ticket: Ticket) -> float:
        """Until one of the running requests ends."""
        seconds = self._forecast.mean_seconds or ticket.service_seconds
        return seconds / self.running.slots(ticket.tenant)

    def _refusal(
        self, ticket: Ticket, reason: str, why: str, seconds: float, is_after_promises: bool = False
    ) -> Exhausted:
        """The error for a request for which there is room in `seconds`, or after all that was promised to others."""
        name = ticket.tenant.name
        self._metrics.admission_refused.labels(tenant=name, reason=reason).inc()
        if ticket.promise is not None:
            self._metrics.admission_returns.labels(outcome="refused").inc()
        now, rate = self.clock(), PROMISED_SHARE * self.running.shared_slots(ticket.tenant)
        if not is_after_promises:
            earliest = now + max(seconds, self._promises.seconds(name) / rate)
            seconds = self._promises.next_gap(name, earliest, ticket.service_seconds, rate) - now
        seconds = min(max(seconds, LEAST_RETRY_SECONDS), MOST_RETRY_SECONDS)
        digest = ticket.demand.digest()
        self._promises.add(name, Promise(now + seconds, digest, ticket.service_seconds, ticket.size.tokens))
        return Exhausted(f"{why}; in {seconds:.1f} s there is room for it", seconds)

    # What runs.

    def _start(self, ticket: Ticket) -> None:
        now, tenant, size = self.clock(), ticket.tenant, ticket.size
        ticket.running_within = self._forecast.running_within(size, ticket.deadline - now)
        if ticket.promise is not None:
            ticket.running_within = max(ticket.running_within, self.running.least_beside_promise())
        self.running.add(ticket)
        if tenant.tokens_per_minute is not None:
            self._accounts[tenant.name].budget.take(size.tokens, tenant.tokens_per_minute, now)
        if ticket.promise is not None:
            self._metrics.admission_returns.labels(outcome="admitted").inc()
        self._queue.charge(tenant.name, size.work)
        ticket.started_at = now
        ticket.status = Status.RUNNING
        ticket.release(None)

    def _end_running(self, ticket: Ticket) -> None:
        now, tenant, size = self.clock(), ticket.tenant, ticket.size
        self.learn_decode(ticket)
        self.running.remove(ticket)
        excess = ticket.tokens - size.answers * size.answer_tokens
        self._queue.charge(tenant.name, size.cost * excess)
        if tenant.tokens_per_minute is not None:
            self._accounts[tenant.name].budget.take(excess, tenant.tokens_per_minute, now)
        self._metrics.tenant_work.labels(tenant=tenant.name).inc(size.cost * (size.prompt_tokens + ticket.tokens))
        if ticket.first_token_at is None:
            return
        for length, ended_itself in ticket.ended:
            self._forecast.lengths.observe(tenant.name, size.route, length, ended_itself)
        if ticket.is_complete:
            tokens = round((size.prompt_tokens + ticket.tokens) / size.answers)
            self._forecast.observe(ticket.first_token_at - ticket.started_at, now - ticket.started_at, tokens)

    def _open_account(self, tenant: Tenant) -> None:
        account = self._accounts.get(tenant.name)
        if account is None:
            self._accounts[tenant.name] = Account(tenant)
            # The keys file may have been replaced.
            self._metrics.add_tenants([tenant.name])
        else:
            account.tenant = tenant

    def _running_beside(self, ticket: Ticket) -> float:
        """How many requests will run on each first shard when those that wait and one more have come.

        A promise is kept at the cost of others: fewer of them start beside it.
        """
        beside = self.running.per_shard_with(len(self._queue) + 1)
        return beside if ticket.promise is None else min(beside, self.running.least_beside_promise())

    def _show(self, tenant: Tenant) -> None:
        self._metrics.tenant_running.labels(tenant=tenant.name).set(self._accounts[tenant.name].running)
        self._metrics.tenant_waiting.labels(tenant=tenant.name).set(self._queue.length(tenant.name))


class Ticket:
    """One admitted request, from its arrival to the end of its answer; leaving its block frees what it holds."""

    # What the request takes; of its answer alone, until its text is tokenized.
    size: Size
    service_seconds: float

    def __init__(
        self, admission: Admission, tenant: Tenant, demand: Demand, deadline: float, promise: Promise | None
    ) -> None:
        self._admission = admission
        self.tenant = tenant
        self.demand = demand
        # By which it expires: its client's, or the default.
        self.deadline = deadline
        # The one with which it comes back.
        self.promise = promise
        self.status = Status.ADMITTED
        self.started_at = 0.0
        # How many may run on its first shard so that it ends in time.
        self.running_within = 0.0
        self.first_token_at: float | None = None
        self.request_seconds_at_first = 0.0
        # Generated ones.
        self.tokens = 0
        # The lengths of the answers that have ended, and whether before their limit; none where lengths are given.
        self.ended: list[tuple[int, bool]] = []
        self._open_answers = demand.answers
        self._is_exact = False
        self._released: asyncio.Future[None] | None = None

    @property
    def is_abandoned(self) -> bool:
        """Whether its client left while it waited."""
        return self._released is not None and self._released.cancelled()

    @property
    def is_complete(self) -> bool:
        """Whether all answers are."""
        return not self._open_answers

    def resize(self, size: Size) -> None:
        """More is known of what it takes."""
        self.size, self.service_seconds = size, self._admission.service_seconds(size)

    def expected_wait(self) -> tuple[float, float]:
        """How many seconds it would wait for shards from now on, and what of the time for which it may: 0 to 1."""
        return self._admission.expected_wait(self)

    async def start(self, route: str, prompt_tokens: int, max_tokens: int, is_exact: bool) -> None:
        """Returns once the request may run on shards. Raises Exhausted or Expired.

        `is_exact`: each answer has `max_tokens` whatever the model says.
        """
        size = self._admission.size(self.tenant.name, route, prompt_tokens, max_tokens, is_exact, self.demand.answers)
        self.resize(size)
        self._is_exact = is_exact
        self._released = asyncio.get_running_loop().create_future()
        self._admission.enqueue(self)
        await self._released

    def release(self, error: Exception | None) -> None:
        """Ends its wait: it runs, or is refused with that error."""
        if self._released is None:
            return
        if error is None:
            self._released.set_result(None)
        else:
            self.status = Status.ENDED
            self._released.set_exception(error)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Shards that have no room against what was expected refuse the request with a time for which room is kept."""
        try:
            yield
        except Exhausted as error:
            raise self._admission.refuse(self, error) from error

    def record_tokens(self, count: int) -> None:
        """Tokens came from the shards."""
        if self.first_token_at is None:
            self.first_token_at = self._admission.clock()
            self.request_seconds_at_first = self._admission.running.request_seconds()
        early = EARLY_DECODED_TOKENS * self.size.answers
        self.tokens += count
        if self.tokens - count < early <= self.tokens:
            self._admission.learn_decode(self)

    def record_finish(self, tokens: int, at_limit: bool) -> None:
        """An answer is complete; `at_limit`: by its number of tokens."""
        self._open_answers -= 1
        if not self._is_exact:
            self.ended.append((tokens, not at_limit))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.end(self)
