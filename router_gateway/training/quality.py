"""How good an answer is, by the best measure that its row allows. Knows no cluster.

gold        1 where the answer states the row's `answer`, else 0
reference   F1 of the words that the answer shares with the row's `reference` (as SQuAD counts them, arXiv 1606.05250)
agreement   the same against the strongest route's answer, where a row has neither
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Measure: TypeAlias = Literal["gold", "reference", "agreement"]

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# GSM8K's gold answers are a derivation, then this and the number.
_GOLD_MARK = "####"


@dataclass(frozen=True)
class Graded:
    """The quality of every route's answer to one prompt, 0 to 1, and how it was measured."""

    qualities: dict[str, float]
    measure: Measure


def grade(row: Mapping[str, Any], answers: Mapping[str, str], routes: Sequence[str]) -> Graded:
    """Grades one answer of each route; `routes` are cheapest first."""
    if isinstance(row.get("answer"), str):
        return Graded({route: float(states(answers[route], row["answer"])) for route in routes}, "gold")
    if isinstance(row.get("reference"), str):
        return Graded({route: shared_words(answers[route], row["reference"]) for route in routes}, "reference")
    strongest = answers[routes[-1]]
    return Graded({route: shared_words(answers[route], strongest) for route in routes}, "agreement")


def states(answer: str, gold: str) -> bool:
    """Whether an answer's last number is the gold number, or its first or last words are the gold words."""
    wanted = gold.rpartition(_GOLD_MARK)[2].strip()
    if _NUMBER.fullmatch(wanted):
        numbers = _NUMBER.findall(answer)
        return bool(numbers) and _number(numbers[-1]) == _number(wanted)
    words, given = _words(wanted), _words(answer)
    return bool(words) and words in (given[: len(words)], given[-len(words) :])


def shared_words(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of words, 0 to 1; 1 where both are empty."""
    given, wanted = Counter(_words(answer)), Counter(_words(reference))
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _number(text: str) -> float:
    return float(text.replace(",", ""))
