"""Are TTFT objectives met? Three concurrent clients with prompts of mixed lengths.

Each request has a `max_ttft_seconds` of 0.7 to 7 times the TTFT of one of the routes on an idle cluster. A refused
request is repeated on the cheapest route without an objective, which shows whether the refusal was right.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.clusters import preset, run, running
from benchmarks.report import Options, options, write
from stitch.cli.ttft import WORDS, Line, regression
from stitch.client import Answer, AsyncClient
from stitch.errors import ObjectivesUnmet

ROUTES = ("weak", "strong")
SHORTEST_WORDS, DOUBLINGS = 16, 4
IDLE_SAMPLES = 10
# The objective divided by the TTFT on an idle cluster; its logarithm is uniform.
LEAST_SLACK, MOST_SLACK = 0.7, 7.0
# A regression line through few samples may be below 0.
LEAST_SECONDS = 0.02
ANSWER_TOKENS = 8
CLIENTS = 3
MEAN_PAUSE_SECONDS = 0.3


@dataclass
class Outcomes:
    """TTFT divided by the objective, of accepted and of refused requests."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    # The routes of accepted requests.
    routes: list[str] = field(default_factory=list)


class Requester:
    """Sends prompts that share no prefix, so that no cached KV shortens their prefill."""

    def __init__(self, client: AsyncClient, seed: int = 0) -> None:
        self._client = client
        self.random = random.Random(seed)

    def prompt(self) -> str:
        """A prompt of random words; the logarithm of its length is uniform."""
        words = int(SHORTEST_WORDS * 2 ** self.random.uniform(0, DOUBLINGS))
        return " ".join(self.random.choices(WORDS, k=words))

    async def on(self, route: str, prompt: str) -> Answer:
        """The answer on that route, without an objective."""
        return await self._client.generate(prompt, route=route, max_tokens=ANSWER_TOKENS, ignore_eos=True)

    async def within(self, seconds: float, prompt: str, outcomes: Outcomes) -> None:
        """Sends a request with an objective, and again without one where it is refused."""
        fields = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        try:
            answer = await self._client.generate(prompt, max_ttft_seconds=seconds, **fields)  # type: ignore[arg-type]
        except ObjectivesUnmet:
            repeated = await self.on(ROUTES[0], prompt)
            outcomes.refused.append((repeated.ttft_seconds or 0) / seconds)
        else:
            outcomes.accepted.append((answer.ttft_seconds or 0) / seconds)
            outcomes.routes.append(answer.route)


async def measure(options: Options) -> None:
    """Measures both routes idle, lets the gateway learn them under load, then sends requests with objectives."""
    learning_seconds, measured_seconds = (8.0, 5.0) if options.tiny else (40.0, 110.0)
    with running(preset()) as local:
        async with AsyncClient(local.gateway) as client:
            requester = Requester(client)
            lines = [await _line(requester, route) for route in ROUTES]
            await _traffic(
                requester, learning_seconds, lambda prompt: requester.on(requester.random.choice(ROUTES), prompt)
            )
            outcomes = await _requests(requester, lines, measured_seconds)
    met, met_repeated = _share_within(outcomes.accepted), _share_within(outcomes.refused)
    samples = {"TTFT / objective, accepted": outcomes.accepted, "TTFT / objective, refused": outcomes.refused}
    shares = {
        "met / accepted": met,
        "refused / all": len(outcomes.refused) / len(outcomes.refused + outcomes.accepted),
        "met without objective / refused": met_repeated,
        "strong / accepted": outcomes.routes.count("strong") / max(len(outcomes.routes), 1),
    }
    write(options, {name: values for name, values in samples.items() if values}, shares)


async def _line(requester: Requester, route: str) -> Line:
    """The regression line of the route's TTFT on an idle cluster."""
    answers = [await requester.on(route, requester.prompt()) for _ in range(IDLE_SAMPLES)]
    return regression([(answer.prompt_tokens, answer.ttft_seconds or 0) for answer in answers])


async def _requests(requester: Requester, lines: Sequence[Line], seconds: float) -> Outcomes:
    outcomes = Outcomes()

    def send(prompt: str) -> Coroutine[Any, Any, object]:
        idle_seconds = requester.random.choice(lines).at(len(prompt.split()))
        slack = LEAST_SLACK * (MOST_SLACK / LEAST_SLACK) ** requester.random.random()
        return requester.within(max(idle_seconds, LEAST_SECONDS) * slack, prompt, outcomes)

    await _traffic(requester, seconds, send)
    return outcomes


async def _traffic(requester: Requester, seconds: float, send: Callable[[str], Coroutine[Any, Any, object]]) -> None:
    """Runs clients for that time, each of which sends a request, reads the answer, pauses, and repeats."""
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await send(requester.prompt())
            await asyncio.sleep(requester.random.expovariate(1 / MEAN_PAUSE_SECONDS))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def _share_within(over_objective: Sequence[float]) -> float:
    return sum(one <= 1 for one in over_objective) / max(len(over_objective), 1)


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
