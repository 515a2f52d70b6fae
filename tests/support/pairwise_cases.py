"""Pairwise sets of test parameters: a few cases in which every pair of values of two axes occurs at least once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise_cases(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases with one value of each axis, chosen greedily: the next one covers the most pairs that are not yet covered.

    Deterministic. With two axes it is their product.
    """
    candidates = list(product(*(range(len(axis)) for axis in axes)))
    uncovered = set().union(*map(_pairs, candidates))
    cases = []
    while uncovered:
        best = max(candidates, key=lambda case: len(uncovered & _pairs(case)))
        uncovered -= _pairs(best)
        cases.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return cases


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(case), 2))
