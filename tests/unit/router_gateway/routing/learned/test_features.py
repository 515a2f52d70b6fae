"""Tests of the features of a text: hashed words, equal on every machine, and the surface, feature by feature."""

from __future__ import annotations

import math

import numpy as np
import pytest

from router_gateway.routing.learned.features import (
    BUCKETS,
    EXCERPT_CHARACTERS,
    HEAD_CHARACTERS,
    MAX_NUMBER,
    SURFACE_FEATURES,
    bucket_counts,
    code_points,
    excerpt,
    surface_features,
)


def buckets(text: str) -> dict[int, int]:
    found, counts = bucket_counts(text)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def test_bucket_of_a_word_does_not_depend_on_its_position() -> None:
    [alone] = buckets("stitch")
    assert alone in buckets("we stitch models")
    assert alone in buckets("x" * 900 + " (stitch)")


def test_buckets_are_the_same_on_every_machine() -> None:
    assert buckets("a b") == {56166: 1, 149541: 1, 250822: 1}


def test_bucket_counts_count_words_and_adjacent_pairs() -> None:
    [word] = buckets("so")
    assert buckets("so so so")[word] == 3
    # One bucket for the word, one for the pair that occurs twice.
    assert sorted(buckets("so so so").values()) == [2, 3]


def test_bucket_counts_ignore_case_and_depend_on_order() -> None:
    assert buckets("Even ODD") == buckets("even odd")
    assert buckets("even odd") != buckets("odd even")


def test_signs_are_words_and_spaces_are_not() -> None:
    assert buckets("2+2") == buckets("2 + 2") == buckets("2\n+\t2")
    assert buckets("2+2") != buckets("2-2")
    assert buckets(" \n\t\u00a0") == {}


@pytest.mark.parametrize("text", ["", "a", "😀", "中文没有空格", "İstanbul ǅ", "\x00\x01", "\ud800 lone", "é" * 5])
def test_bucket_counts_accept_any_text(text: str) -> None:
    assert all(0 <= bucket < BUCKETS and count > 0 for bucket, count in buckets(text).items())


def test_words_of_other_scripts_have_different_buckets() -> None:
    assert buckets("привет") != buckets("спасибо")


def test_bucket_counts_read_only_both_ends_of_a_long_text() -> None:
    text = "begin " + "x " * 60_000 + "end"
    assert len(excerpt(text)) == EXCERPT_CHARACTERS
    assert set(buckets("begin")) | set(buckets("end")) <= set(buckets(text))
    hidden = "x " * HEAD_CHARACTERS + "hidden " + "x " * HEAD_CHARACTERS
    assert not set(buckets("hidden")) & set(buckets(hidden))


def test_excerpt_of_a_short_text_is_the_text() -> None:
    assert excerpt("y" * EXCERPT_CHARACTERS) == "y" * EXCERPT_CHARACTERS


def test_code_points_are_bounded_where_lower_case_is_longer() -> None:
    grown = "İ" * EXCERPT_CHARACTERS
    assert len(grown.lower()) > EXCERPT_CHARACTERS
    assert len(code_points(grown.lower())) == EXCERPT_CHARACTERS
    assert len(buckets(grown)) == 1


def surface_of(text: str) -> dict[str, float]:
    return dict(zip(SURFACE_FEATURES, surface_features(text).tolist(), strict=True))


@pytest.mark.parametrize(
    ("text", "feature", "count"),
    [
        ("one two three", "words", 3),
        ("12 apples, 12 pears and 3.5 plums", "numbers", 3),
        ("12 apples, 12 pears and 3.5 plums", "different_numbers", 2),
        ("12 apples, 12 pears and 3.5 plums", "decimals", 1),
        ("a\nb\nc", "lines", 2),
        ("One. Two! Three? 3.5 four", "sentences", 3),
        ("a, b, c", "commas", 2),
        ("$5 or 5 %", "dollars", 1),
        ("$5 or 5 %", "percents", 1),
        (r"\frac{1}{2}", "backslashes", 1),
        ("why? how?", "questions", 2),
        ("1/2 and 3/4", "slashes", 2),
        ("from 7 to 1,250 to 30", "greatest_number", 1250),
        ("a considerable improvement of it", "long_words", 2),
        ("One two. Three four five.", "longest_sentence", 3),
        ("abcd", "characters", 4),
    ],
)
def test_surface_count_is_a_logarithm(text: str, feature: str, count: float) -> None:
    assert surface_of(text)[feature] == pytest.approx(math.log1p(count), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "feature", "share"),
    [
        ("ABcd", "capital_share", 0.5),
        ("a1b2", "digit_share", 0.5),
        ("aé", "foreign_share", 0.5),
        ("aaaa bbbb", "word_length", 3.0),
        ("x x x", "different_word_share", 0.25),
    ],
)
def test_surface_share(text: str, feature: str, share: float) -> None:
    assert surface_of(text)[feature] == pytest.approx(share)


@pytest.mark.parametrize("text", ["", " ", "9" * 100_000, "😀" * 100_000, "…", "1,,,2", "\ud800", "٣٤", "." * 9_000])
def test_surface_features_are_finite_for_any_text(text: str) -> None:
    assert np.isfinite(surface_features(text)).all()


def test_surface_number_is_clipped() -> None:
    assert surface_of("9" * 5_000)["greatest_number"] == pytest.approx(math.log1p(MAX_NUMBER), rel=1e-6)


def test_surface_length_counts_the_whole_text() -> None:
    assert surface_of("x" * 50_000)["characters"] == pytest.approx(math.log1p(50_000), rel=1e-6)
