"""What can be seen in a query without a model: its length, and signs of hard work. Knows no weights.

Each feature is a number from 0 to 1 with the words that show it to a person.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Content is looked for in so many characters at each end of a text: asks stand at its ends, and the cost is bounded.
EXCERPT_CHARACTERS = 4_000
# Scripts without spaces have words, too: no language's words are much longer on average.
CHARACTERS_PER_WORD = 6
# A text of so many words is as long as length can count.
LONG_WORDS = 1_000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CODE = re.compile(
    r"```|^[ \t]*(?:def|class|import|from|return|#include|func|fn|public|SELECT)[ \t]"
    r"|[;{][ \t]*$|\b\w+\(\w*\)|=>|==|</\w",
    re.MULTILINE,
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_MATHS = re.compile(r"\\[a-z]{2,}|[=^√∑∫≤≥≠]|\d ?[-+*/×÷%] ?\d")
_WORD = re.compile(r"[^\W\d_]+")
_REASONING = _words(
    "why how explain prove derive compare analyse analyze design evaluate calculate solve reason step steps difference "
    "differences tradeoff summarise summarize translate refactor debug optimise optimize "
    "warum wieso erkläre beweise vergleiche pourquoi comment explique"
)
_CONSTRAINTS = _words(
    "must should exactly least most without only except unless each every both avoid ensure never always"
)
_CHOICE = re.compile(r"^[ \t]*\(?[A-D][.):][ \t]", re.MULTILINE)
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Feature:
    name: str
    # 0 to 1.
    value: float
    # As a reason shows it, such as `12 words`.
    shown: str


def features(turns: Sequence[str]) -> list[Feature]:
    """All features of what a user said, those with the value 0 included."""
    text = "\n".join(turns)
    words = max(len(_excerpt(text).split()), len(text) // CHARACTERS_PER_WORD)
    return [
        Feature("length", min(math.log(words + 1, LONG_WORDS + 1), 1.0), _count(words, "word")),
        *_content(_excerpt(text)),
        _counted("turns", len(turns) - 1, 4, "earlier turn"),
    ]


def _content(text: str) -> list[Feature]:
    choices = len(_CHOICE.findall(text))
    words = _WORD.findall(text.lower())
    constraints = sum(word in _CONSTRAINTS for word in words) + len(_LIST_ITEM.findall(text))
    return [
        _counted("code", len(_CODE.findall(text)), 3, "sign of code", "signs of code"),
        _counted("numbers", len(_NUMBER.findall(text)), 6, "number"),
        _counted("maths", len(_MATHS.findall(text)), 3, "formula"),
        _counted("reasoning", sum(word in _REASONING for word in words), 2, "reasoning word"),
        # One lettered line is a heading; two are a choice.
        Feature("choice", float(choices >= 2), _count(choices, "choice")),
        _counted("constraints", constraints, 4, "constraint"),
    ]


def _excerpt(text: str) -> str:
    if len(text) <= 2 * EXCERPT_CHARACTERS:
        return text
    return f"{text[:EXCERPT_CHARACTERS]}\n{text[-EXCERPT_CHARACTERS:]}"


def _counted(name: str, count: int, full: int, singular: str, plural: str = "") -> Feature:
    """A feature that is 1 from `full` occurrences on."""
    return Feature(name, min(max(count, 0) / full, 1.0), _count(count, singular, plural))


def _count(count: int, singular: str, plural: str = "") -> str:
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"
