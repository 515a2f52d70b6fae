"""Twenty numbers that a text's surface shows: lengths, signs, numbers. Knows no words and no weights.

Part of the artefact's format: a change here needs a new FEATURES name there.
"""

from __future__ import annotations

import re
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from router_gateway.routing.learned.excerpt import code_points, excerpt

Surface: TypeAlias = NDArray[np.float32]

SURFACE_FEATURES = (
    "characters",
    "words",
    "numbers",
    "different_numbers",
    "lines",
    "sentences",
    "commas",
    "dollars",
    "percents",
    "backslashes",
    "questions",
    "slashes",
    "decimals",
    "greatest_number",
    "long_words",
    "longest_sentence",
    "capital_share",
    "digit_share",
    "foreign_share",
    "word_length",
    "different_word_share",
)
LONG_WORD_CHARACTERS = 7
# Beyond this a number's size says nothing more; it also keeps a run of digits from becoming infinite.
GREATEST_NUMBER = 1e15

_NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")


def surface(text: str) -> Surface:
    """[SURFACE_FEATURES]: counts as log(1 + n), then shares, all finite for any text."""
    seen = excerpt(text)
    shares = _shares(seen)
    return np.array([*np.log1p([len(text), *_counts(seen)]), *shares], np.float32)


def _counts(text: str) -> list[float]:
    """From `words` to `longest_sentence`."""
    words = text.split()
    numbers = _NUMBER.findall(text)
    sentences = _SENTENCE_END.split(text)
    signs = [text.count(sign) for sign in ",$%\\?/"]
    return [
        len(words),
        len(numbers),
        len(set(numbers)),
        text.count("\n"),
        len(sentences) - 1,
        *signs,
        sum("." in number for number in numbers),
        max((_value(number) for number in numbers), default=0.0),
        sum(len(word) >= LONG_WORD_CHARACTERS for word in words),
        max(len(sentence.split()) for sentence in sentences),
    ]


def _value(number: str) -> float:
    return min(float(number.replace(",", "")), GREATEST_NUMBER)


def _shares(text: str) -> list[float]:
    """From `capital_share` to `different_word_share`."""
    characters = code_points(text)
    length = max(len(characters), 1)
    words = text.split()
    return [
        int(np.count_nonzero((characters >= ord("A")) & (characters <= ord("Z")))) / length,
        int(np.count_nonzero((characters >= ord("0")) & (characters <= ord("9")))) / length,
        int(np.count_nonzero(characters > 0x7F)) / length,
        length / (len(words) + 1),
        len(set(words)) / (len(words) + 1),
    ]
