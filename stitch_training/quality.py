"""How good a route is on a prompt, by the best measure that its row allows. Knows no connection.

gold        1 where the route's answer states the row's `answer`, else 0
reference   how likely the route finds the row's `reference`: the geometric mean of its tokens' probabilities
agreement   the same of the strongest route's answer, where a row has neither
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from stitch_training.gold import states

Measure: TypeAlias = Literal["gold", "reference", "agreement"]


class Routes(Protocol):
    """The routes of a cluster; both raise StitchError where there is no answer."""

    async def answer(self, prompt: str, route: str) -> str:
        """What a route says to a prompt."""
        ...

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        """The geometric mean of the probabilities, 0 to 1, that a route gives to the tokens of an answer."""
        ...


@dataclass(frozen=True)
class Graded:
    """The quality of every route on one prompt, 0 to 1, and how it was measured."""

    qualities: dict[str, float]
    measure: Measure


async def grade(row: Mapping[str, Any], names: Sequence[str], routes: Routes) -> Graded:
    """Grades the named routes, which are cheapest first, on one row. Raises what `routes` raises."""
    prompt, gold, reference = row["prompt"], row.get("answer"), row.get("reference")
    if isinstance(gold, str):
        return Graded({name: float(states(await routes.answer(prompt, name), gold)) for name in names}, "gold")
    if isinstance(reference, str):
        return Graded(await _likelihoods(prompt, names, routes, reference), "reference")
    strongest = await routes.answer(prompt, names[-1])
    return Graded(await _likelihoods(prompt, names, routes, strongest), "agreement")


async def _likelihoods(prompt: str, names: Sequence[str], routes: Routes, answer: str) -> dict[str, float]:
    return {name: await routes.likelihood(prompt, name, answer) for name in names}
