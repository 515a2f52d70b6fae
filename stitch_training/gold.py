"""Whether an answer states what a row knows to be right. Knows no route."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# GSM8K's gold answers are a derivation, then this and the number.
_GOLD_MARK = "####"


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
