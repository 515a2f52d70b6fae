"""The one way in for requests of every protocol: `admit(credentials, demand)`.

In go what a caller shows of itself and what it asks for, out comes a `Ticket`, or the error that refuses it. Invariant:
a ticket whose block has ended holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from router_gateway.admission.tenants import Credentials, Tenant, Tenants


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for, as far as it is known before its text is tokenized."""

    # The most tokens of its answer; None: what its tenant may have.
    max_tokens: int | None
    # The route that it names; None: the router decides.
    route: str | None
    # When its client stops waiting, in seconds of the clock; None: the client set no deadline.
    deadline: float | None


class Admission:
    """Admits the requests of all tenants."""

    def __init__(self, tenants: Tenants, default_deadline_seconds: float, clock: Callable[[], float]) -> None:
        self.tenants = tenants
        self._default_deadline_seconds = default_deadline_seconds
        self._clock = clock

    def authenticate(self, credentials: Credentials) -> Tenant:
        """The tenant of a call that computes nothing. Raises Unauthenticated."""
        return self.tenants.authenticate(credentials)

    def admit(self, credentials: Credentials, demand: Demand) -> Ticket:
        """A ticket for one request. Raises Unauthenticated, Forbidden or InvalidRequest."""
        tenant = self.tenants.authenticate(credentials)
        tenant.check_route(demand.route)
        if demand.max_tokens is not None:
            tenant.check_max_tokens(demand.max_tokens)
        deadline = demand.deadline
        return Ticket(tenant, self._clock() + self._default_deadline_seconds if deadline is None else deadline)


@dataclass(slots=True)
class Ticket:
    """One admitted request, from its arrival to the end of its answer."""

    tenant: Tenant
    deadline: float

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
