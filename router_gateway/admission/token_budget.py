"""What one tenant uses: its running requests, and a budget that refills steadily, up to one minute's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from router_gateway.admission.tenants import Tenant


class TokenBudget:
    """Times are seconds of one monotonic clock. The limit may change between calls."""

    def __init__(self) -> None:
        # Tokens that were taken and are not refilled yet.
        self._taken = 0.0
        self._at = 0.0

    def take(self, tokens: float, limit: int, now: float) -> None:
        """Takes tokens, or gives some back where the number is negative."""
        self._refill(limit, now)
        self._taken = max(0.0, self._taken + tokens)

    def seconds_until(self, tokens: float, limit: int, now: float) -> float:
        """Until that many tokens can be taken; of more than the limit, until they are refilled in several minutes."""
        self._refill(limit, now)
        return max(0.0, (self._taken + tokens - limit) * 60 / limit)

    def _refill(self, limit: int, now: float) -> None:
        self._taken = max(0.0, self._taken - (now - self._at) * limit / 60)
        self._at = now


@dataclass(slots=True)
class Account:
    """What the running requests of one tenant hold, and what it has used."""

    # As its last request found it.
    tenant: Tenant
    running: int = 0
    budget: TokenBudget = field(default_factory=TokenBudget)
