"""How good a route is on a prompt, by the best measure that its row allows. Knows no connection.

gold        1 where the route's answer states the row's `answer`, else 0
reference   how likely the route finds the row's `reference`: the geometric mean of its tokens' probabilities
agreement   the same of the strongest route's answer, where a row has neither
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

Measure: TypeAlias = Literal["gold", "reference", "agreement"]

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# GSM8K's gold answers are a derivation, then this and the number.
_GOLD_MARK = "####"


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


def states(answer: str, gold: str) -> bool:
    """Whether an answer's last number is the gold number, or its first or last words are the gold words."""
    wanted = gold.rpartition(_GOLD_MARK)[2].strip()
    if _NUMBER.fullmatch(wanted):
        numbers = _NUMBER.findall(answer)
        return bool(numbers) and _number(numbers[-1]) == _number(wanted)
    words, given = _words(wanted), _words(answer)
    return bool(words) and words in (given[: len(words)], given[-len(words) :])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _number(text: str) -> float:
    return float(text.replace(",", ""))
