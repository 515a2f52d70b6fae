"""Are objectives for the first text kept to? Three clients with prompts of mixed lengths, at once.

Each asks for its first text within a time around what one of the routes takes when nothing else runs. What is refused
is asked again on the cheapest route without an objective, to see whether the refusal was right.
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
# The objective over the time of an idle cluster, small ones as often as large ones.
LEAST_SLACK, MOST_SLACK = 0.7, 7.0
# A line through few samples may pass below 0.
LEAST_SECONDS = 0.02
ANSWER_TOKENS = 8
CLIENTS = 3
MEAN_PAUSE_SECONDS = 0.3


@dataclass
class Asked:
    """What became of the requests: seconds to the first text over the objective."""

    admitted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    # Routes of the admitted ones.
    routes: list[str] = field(default_factory=list)


class Asker:
    """Asks with prompts that all begin differently, so that nothing cached shortens them."""

    def __init__(self, client: AsyncClient, seed: int = 0) -> None:
        self._client = client
        self.random = random.Random(seed)

    def prompt(self) -> str:
        """Short ones as often as long ones."""
        words = int(SHORTEST_WORDS * 2 ** self.random.uniform(0, DOUBLINGS))
        return " ".join(self.random.choices(WORDS, k=words))

    async def on(self, route: str, prompt: str) -> Answer:
        """Without an objective."""
        return await self._client.generate(prompt, route=route, max_tokens=ANSWER_TOKENS, ignore_eos=True)

    async def within(self, seconds: float, prompt: str, asked: Asked) -> None:
        """With one, and again without where that is refused."""
        fields = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        try:
            answer = await self._client.generate(prompt, max_ttft_seconds=seconds, **fields)  # type: ignore[arg-type]
        except ObjectivesUnmet:
            anyway = await self.on(ROUTES[0], prompt)
            asked.refused.append((anyway.ttft_seconds or 0) / seconds)
        else:
            asked.admitted.append((answer.ttft_seconds or 0) / seconds)
            asked.routes.append(answer.route)


async def measure(options: Options) -> None:
    """Learns what routes take on an idle cluster and on a busy one, then asks."""
    learning_seconds, asking_seconds = (8.0, 5.0) if options.tiny else (40.0, 110.0)
    with running(preset()) as local:
        async with AsyncClient(local.gateway) as client:
            asker = Asker(client)
            lines = [await _line(asker, route) for route in ROUTES]
            await _traffic(asker, learning_seconds, lambda prompt: asker.on(asker.random.choice(ROUTES), prompt))
            asked = await _ask(asker, lines, asking_seconds)
    met, kept_anyway = _share_within(asked.admitted), _share_within(asked.refused)
    samples = {"TTFT / objective, taken": asked.admitted, "TTFT / objective, refused": asked.refused}
    shares = {
        "met / taken": met,
        "refused / all": len(asked.refused) / len(asked.refused + asked.admitted),
        "met without objective / refused": kept_anyway,
        "strong / taken": asked.routes.count("strong") / max(len(asked.routes), 1),
    }
    write(options, {name: values for name, values in samples.items() if values}, shares)


async def _line(asker: Asker, route: str) -> Line:
    """What the route takes while nothing else runs."""
    answers = [await asker.on(route, asker.prompt()) for _ in range(IDLE_SAMPLES)]
    return regression([(answer.prompt_tokens, answer.ttft_seconds or 0) for answer in answers])


async def _ask(asker: Asker, lines: Sequence[Line], seconds: float) -> Asked:
    asked = Asked()

    def ask(prompt: str) -> Coroutine[Any, Any, object]:
        idle_seconds = asker.random.choice(lines).at(len(prompt.split()))
        slack = LEAST_SLACK * (MOST_SLACK / LEAST_SLACK) ** asker.random.random()
        return asker.within(max(idle_seconds, LEAST_SECONDS) * slack, prompt, asked)

    await _traffic(asker, seconds, ask)
    return asked


async def _traffic(asker: Asker, seconds: float, ask: Callable[[str], Coroutine[Any, Any, object]]) -> None:
    """Clients that ask, read the answer, pause, and ask again, for so long."""
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await ask(asker.prompt())
            await asyncio.sleep(asker.random.expovariate(1 / MEAN_PAUSE_SECONDS))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def _share_within(over_objective: Sequence[float]) -> float:
    return sum(one <= 1 for one in over_objective) / max(len(over_objective), 1)


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
