"""What a text's surface shows, feature by feature."""

from __future__ import annotations

import math

import numpy as np
import pytest

from router_gateway.routing.learned.surface import GREATEST_NUMBER, SURFACE_FEATURES, surface


def seen(text: str) -> dict[str, float]:
    return dict(zip(SURFACE_FEATURES, surface(text).tolist(), strict=True))


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
def test_a_count_is_seen_as_its_logarithm(text: str, feature: str, count: float) -> None:
    assert seen(text)[feature] == pytest.approx(math.log1p(count), rel=1e-6)


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
def test_a_share(text: str, feature: str, share: float) -> None:
    assert seen(text)[feature] == pytest.approx(share)


@pytest.mark.parametrize("text", ["", " ", "9" * 100_000, "😀" * 100_000, "…", "1,,,2", "\ud800", "٣٤", "." * 9_000])
def test_any_text_has_finite_features(text: str) -> None:
    assert np.isfinite(surface(text)).all()


def test_an_endless_number_is_bounded() -> None:
    assert seen("9" * 5_000)["greatest_number"] == pytest.approx(math.log1p(GREATEST_NUMBER), rel=1e-6)


def test_the_length_is_that_of_the_whole_text() -> None:
    assert seen("x" * 50_000)["characters"] == pytest.approx(math.log1p(50_000), rel=1e-6)
