"""What the learned router computes from a text: hashed words and word pairs, and 21 surface features.

Only an excerpt of a text is read, so the cost has a bound however long the text is: a request's instructions are
nearly always at its start or its end. All functions accept any text, lone surrogates included. They are part of the
artifact's format: a change here needs a new name in `artifact.FEATURES`.
"""

from __future__ import annotations

import re
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

CodePoints: TypeAlias = NDArray[np.uint32]
Hashes: TypeAlias = NDArray[np.uint64]
Buckets: TypeAlias = NDArray[np.int64]
Counts: TypeAlias = NDArray[np.int64]
Surface: TypeAlias = NDArray[np.float32]

HEAD_CHARACTERS = 6_144
TAIL_CHARACTERS = 2_048
EXCERPT_CHARACTERS = HEAD_CHARACTERS + TAIL_CHARACTERS

BUCKET_BITS = 18
BUCKETS = 1 << BUCKET_BITS

# Odd, so that it has an inverse modulo 2^64.
_BASE = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64
_PAIR_MULTIPLIER = np.uint64(0x632BE59BD9B4E019)
# Letters beyond ASCII begin about here. Scripts without spaces give long words, which few other texts share.
_FIRST_NON_ASCII_LETTER = 0xC0

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
# Numbers are clipped here, which also keeps a long run of digits from becoming infinite.
MAX_NUMBER = 1e15

_NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")


def excerpt(text: str) -> str:
    """The first HEAD_CHARACTERS and the last TAIL_CHARACTERS of a text, or all of it where it is no longer."""
    if len(text) <= EXCERPT_CHARACTERS:
        return text
    return text[:HEAD_CHARACTERS] + text[-TAIL_CHARACTERS:]


def code_points(text: str) -> CodePoints:
    """[characters], at most EXCERPT_CHARACTERS, since lower-casing an excerpt may lengthen it."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)[:EXCERPT_CHARACTERS]


def bucket_counts(text: str) -> tuple[Buckets, Counts]:
    """The buckets of a text's words and pairs of adjacent words, ascending, and the count of each.

    The hash of the characters [s, e) is the difference of two prefix sums of `mix(character) · B^position`, divided
    by B^s, modulo 2^64: it depends on the word alone, not on its position, and needs no loop over characters.
    """
    characters = code_points(excerpt(text).lower())
    words = _word_hashes(characters)
    pairs = _mix(words[:-1] * _PAIR_MULTIPLIER + words[1:])
    hashed = np.concatenate([words, pairs]) & np.uint64(BUCKETS - 1)
    return np.unique(hashed.astype(np.int64), return_counts=True)


def surface_features(text: str) -> Surface:
    """[SURFACE_FEATURES]: counts as log(1 + n), then shares; all are finite."""
    kept = excerpt(text)
    shares = _shares(kept)
    return np.array([*np.log1p([len(text), *_counts(kept)]), *shares], np.float32)


def _powers(base: int) -> Hashes:
    powers = [1]
    for _ in range(EXCERPT_CHARACTERS):
        powers.append(powers[-1] * base % _MODULUS)
    return np.array(powers, np.uint64)


_POWERS = _powers(_BASE)
_INVERSE_POWERS = _powers(pow(_BASE, -1, _MODULUS))


def _mix(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _word_hashes(characters: CodePoints) -> Hashes:
    """[words]: one hash for each run of letters and digits, and one for each sign that is neither nor a space."""
    starts, ends = _word_bounds(characters)
    prefix = np.zeros(len(characters) + 1, np.uint64)
    weighted = _mix(characters.astype(np.uint64) + np.uint64(_BASE)) * _POWERS[: len(characters)]
    np.cumsum(weighted, out=prefix[1:], dtype=np.uint64)
    return _mix((prefix[ends] - prefix[starts]) * _INVERSE_POWERS[starts])


def _word_bounds(characters: CodePoints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[words] each: the first character of every word, and one past its last."""
    letters = _are_letters(characters)
    spaces = (characters <= ord(" ")) | (characters == 0xA0)
    letter_before, letter_after = np.zeros_like(letters), np.zeros_like(letters)
    letter_before[1:], letter_after[:-1] = letters[:-1], letters[1:]
    signs = ~letters & ~spaces
    starts = np.flatnonzero(signs | (letters & ~letter_before))
    ends = np.flatnonzero(signs | (letters & ~letter_after)) + 1
    return starts, ends


def _are_letters(characters: CodePoints) -> NDArray[np.bool_]:
    """[characters]: whether each is a letter or a digit, of lower-cased text."""
    digit = (characters >= ord("0")) & (characters <= ord("9"))
    latin = (characters >= ord("a")) & (characters <= ord("z"))
    return digit | latin | (characters >= _FIRST_NON_ASCII_LETTER)


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
    return min(float(number.replace(",", "")), MAX_NUMBER)


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
