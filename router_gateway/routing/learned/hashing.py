"""Words and pairs of words as hashed buckets, without a loop over characters. Knows no weights.

The hash of the characters [s, e) is the difference of two prefix sums of `mixed(character) · B^position`, divided by
B^s, all modulo 2^64, so that equal words have equal hashes wherever they stand. Part of the artefact's format: a
change here needs a new FEATURES name there.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from router_gateway.routing.learned.excerpt import EXCERPT_CHARACTERS, CodePoints, code_points, excerpt

Hashes: TypeAlias = NDArray[np.uint64]
Buckets: TypeAlias = NDArray[np.int64]
Counts: TypeAlias = NDArray[np.int64]

BUCKET_BITS = 18
BUCKETS = 1 << BUCKET_BITS

# Odd, so that it has an inverse modulo 2^64.
_BASE = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64
_PAIR = np.uint64(0x632BE59BD9B4E019)
# Letters beyond ASCII begin about here; scripts without spaces make long words, of which other texts share few.
_FIRST_FOREIGN_LETTER = 0xC0


def _powers(base: int) -> Hashes:
    powers = [1]
    for _ in range(EXCERPT_CHARACTERS):
        powers.append(powers[-1] * base % _MODULUS)
    return np.array(powers, np.uint64)


_POWERS = _powers(_BASE)
_INVERSE_POWERS = _powers(pow(_BASE, -1, _MODULUS))


def _mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def bucket_counts(text: str) -> tuple[Buckets, Counts]:
    """The buckets of a text's words and pairs of neighbouring words, rising, and how often each occurs."""
    characters = code_points(excerpt(text).lower())
    words = _word_hashes(characters)
    pairs = _mixed(words[:-1] * _PAIR + words[1:])
    hashed = np.concatenate([words, pairs]) & np.uint64(BUCKETS - 1)
    return np.unique(hashed.astype(np.int64), return_counts=True)


def _word_hashes(characters: CodePoints) -> Hashes:
    """[words]: one hash for each run of letters and digits, and for each single sign that is neither nor a space."""
    starts, ends = _word_bounds(characters)
    prefix = np.zeros(len(characters) + 1, np.uint64)
    weighted = _mixed(characters.astype(np.uint64) + np.uint64(_BASE)) * _POWERS[: len(characters)]
    np.cumsum(weighted, out=prefix[1:], dtype=np.uint64)
    return _mixed((prefix[ends] - prefix[starts]) * _INVERSE_POWERS[starts])


def _word_bounds(characters: CodePoints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    letters = _are_letters(characters)
    spaces = (characters <= ord(" ")) | (characters == 0xA0)
    before, after = np.zeros_like(letters), np.zeros_like(letters)
    before[1:], after[:-1] = letters[:-1], letters[1:]
    signs = ~letters & ~spaces
    starts = np.flatnonzero(signs | (letters & ~before))
    ends = np.flatnonzero(signs | (letters & ~after)) + 1
    return starts, ends


def _are_letters(characters: CodePoints) -> NDArray[np.bool_]:
    digit = (characters >= ord("0")) & (characters <= ord("9"))
    latin = (characters >= ord("a")) & (characters <= ord("z"))
    return digit | latin | (characters >= _FIRST_FOREIGN_LETTER)
