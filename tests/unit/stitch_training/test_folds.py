"""Splits without leaks."""

from __future__ import annotations

from stitch_training.folds import folds


def test_folds_are_of_one_size() -> None:
    sizes = [folds([str(row) for row in range(103)], 5).tolist().count(fold) for fold in range(5)]
    assert sorted(sizes) == [20, 20, 21, 21, 21]


def test_equal_prompts_share_a_fold() -> None:
    keys = [str(row % 40) for row in range(120)]
    found = folds(keys, 5)
    assert all(len({found[row] for row in range(120) if keys[row] == key}) == 1 for key in keys)


def test_the_seed_decides() -> None:
    keys = [str(row) for row in range(50)]
    assert folds(keys, 5).tolist() == folds(keys, 5).tolist()
    assert folds(keys, 5, seed=1).tolist() != folds(keys, 5).tolist()
