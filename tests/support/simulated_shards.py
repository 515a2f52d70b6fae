"""Requests of simulated clients through a real `Admission`, onto shards whose passes take a + b · running seconds.

Every pass gives each running request a token, and prompts are computed one after another, as on one first shard.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from router_gateway.admission.admission import Admission, Demand
from router_gateway.admission.capacity import Capacity
from router_gateway.admission.forecast import Forecast
from router_gateway.admission.tenants import Credentials, Tenant, Tenants
from router_gateway.metrics import Metrics
from router_gateway.routing.router import REASON_KINDS
from router_gateway.routing.ttft_predictor import TtftPredictor
from stitch.cluster import GatewayConfig
from stitch.errors import Exhausted, Expired

ROUTE = "strong"
PASS_SECONDS, PASS_SECONDS_PER_REQUEST = 0.02, 0.005
PREFILL_SECONDS_PER_TOKEN = 0.001


@dataclass(slots=True, eq=False)
class Running:
    """One request on the shards."""

    prompt_tokens: int
    left: int
    on_token: Callable[[], None]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class SimulatedShards:
    """One chain."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        self.running: list[Running] = []
        self.most_running = 0
        self._wake = asyncio.Event()

    async def run(self) -> None:
        while True:
            while not self.running:
                self._wake.clear()
                await self._wake.wait()
            batch = list(self.running)
            prompts = [one for one in batch if one.prompt_tokens]
            seconds = PASS_SECONDS + PASS_SECONDS_PER_REQUEST * len(batch)
            if prompts:
                seconds += PREFILL_SECONDS_PER_TOKEN * prompts[0].prompt_tokens
                prompts[0].prompt_tokens = 0
            await asyncio.sleep(seconds / self.speed)
            for one in batch:
                if one in self.running and not one.prompt_tokens:
                    self._give(one)

    async def answer(self, tenant: str, prompt_tokens: int, tokens: int, on_token: Callable[[], None]) -> None:
        """Returns once the request has its tokens; all tenants are served alike."""
        one = Running(prompt_tokens, tokens, on_token)
        self.running.append(one)
        self.most_running = max(self.most_running, len(self.running))
        self._wake.set()
        try:
            await one.ended.wait()
        finally:
            if one in self.running:
                self.running.remove(one)

    def _give(self, one: Running) -> None:
        one.left -= 1
        one.on_token()
        if not one.left:
            self.running.remove(one)
            one.ended.set()


class Shards(Protocol):
    """One chain."""

    async def run(self) -> None: ...

    async def answer(self, tenant: str, prompt_tokens: int, tokens: int, on_token: Callable[[], None]) -> None: ...


@dataclass(slots=True)
class Counts:
    """What became of requests; seconds are from a request's arrival."""

    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_seconds: list[float] = field(default_factory=list)
    refusal_seconds: list[float] = field(default_factory=list)
    # Refused requests that came back when they were told to.
    returned: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


class Simulation:
    """Clients of several tenants; create it in a `VirtualTimeLoop`."""

    def __init__(self, *tenants: Tenant, kv_tokens: int = 0, shards: Shards | None = None, **gateway: Any) -> None:
        loop = asyncio.get_running_loop()
        self.clock = loop.time
        self.shards = SimulatedShards() if shards is None else shards
        self.predictor = TtftPredictor([ROUTE], lambda: 1, self.clock)
        self.forecast = Forecast(self.predictor.predict_seconds, lambda: {ROUTE: 1.0})
        self.metrics = Metrics([ROUTE], REASON_KINDS)
        self._tenants = {one.name: one for one in tenants or (Tenant(name="default"),)}
        self.admission = Admission(
            _NamedTenants(self._tenants),
            GatewayConfig(address="h:1", **gateway),
            self.forecast,
            lambda: Capacity(1, kv_tokens),
            self.metrics,
            self.clock,
        )
        self._tasks = [asyncio.create_task(self.shards.run()), asyncio.create_task(self.admission.keep_promises())]
        self.counts: dict[str, Counts] = {name: Counts() for name in self._tenants}
        self._number = 0

    async def request(
        self,
        tenant: str = "default",
        *,
        deadline_seconds: float | None = 10.0,
        prompt_tokens: int = 64,
        tokens: int = 32,
        max_tokens: int | None = None,
        returns: Callable[[float], bool] = lambda seconds: False,
    ) -> str:
        """The outcome of one request: finished, late, refused. It comes back where `returns` of the told seconds."""
        self._number += 1
        digest = self._number.to_bytes(8, "big")
        outcome, told = await self._try(tenant, digest, deadline_seconds, prompt_tokens, tokens, max_tokens)
        self.counts[tenant].outcomes[outcome] += 1
        while outcome == "refused" and returns(told):
            await asyncio.sleep(told + 0.01)
            outcome, told = await self._try(tenant, digest, deadline_seconds, prompt_tokens, tokens, max_tokens)
            self.counts[tenant].outcomes[outcome] += 1
            self.counts[tenant].returned[outcome] += 1
        return outcome

    async def _try(
        self, tenant: str, digest: bytes, deadline: float | None, prompt: int, tokens: int, most: int | None
    ) -> tuple[str, float]:
        arrival, counts = self.clock(), self.counts[tenant]
        demand = Demand(most or tokens, ROUTE, None if deadline is None else arrival + deadline, lambda: digest)
        try:
            async with asyncio.timeout(deadline):
                with self.admission.admit(Credentials(tenant), demand) as ticket:
                    await ticket.start(ROUTE, prompt, most or tokens, is_exact=most is None)
                    with self.predictor.track(prompt, ROUTE) as tracked:

                        def on_token() -> None:
                            if not ticket.tokens:
                                counts.ttft_seconds.append(self.clock() - arrival)
                                tracked.prompt_computed()
                                tracked.text_sent()
                            ticket.record_tokens(1)
                            counts.tokens += 1

                        await self.shards.answer(tenant, prompt, tokens, on_token)
                    ticket.record_finish(tokens, at_limit=most is None or tokens == most)
        except Exhausted as error:
            counts.refusal_seconds.append(self.clock() - arrival)
            return "refused", error.retry_after_seconds
        except (TimeoutError, Expired):
            return "late", 0.0
        return "finished", 0.0

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks)


class _NamedTenants(Tenants):
    """Tenants whose key is their name."""

    def __init__(self, by_name: dict[str, Tenant]) -> None:
        super().__init__()
        self._by_name = by_name

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def authenticate(self, credentials: Credentials) -> Tenant:
        return self._by_name[credentials.key or ""]
