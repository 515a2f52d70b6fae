"""Tests of the mixture of experts against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_gateway.routing.learned.features import SURFACE_FEATURES
from router_gateway.routing.learned.model import SURFACE_LIMIT, LearnedModel, standardized, term_frequency


def test_known_word_adds_its_weight(model: LearnedModel) -> None:
    assert model.qualities("prove").tolist() == pytest.approx([0.5, 1.0])
    assert model.gains("Hello").tolist() == pytest.approx([0.0, -0.25])


def test_word_vector_has_length_one(model: LearnedModel) -> None:
    # Two words of equal weight, so each counts 1 / sqrt(2); their pair is unknown.
    assert model.gains("prove hello")[1] == pytest.approx((0.5 - 0.25) / 2**0.5, abs=1e-3)


def test_rare_word_counts_more_by_its_idf(model: LearnedModel) -> None:
    first = int(np.argmax(model.weights[:, -1]))
    idf = np.ones_like(model.idf)
    idf[first, 1] = 3.0
    weights = model.weights.copy()
    weights[first] *= 3
    rare = replace(model, idf=idf, weights=weights)
    assert rare.gains("prove hello")[1] == pytest.approx((3 * 0.5 - 0.25) / 10**0.5, abs=1e-3)


@pytest.mark.parametrize("text", ["", "unknown words only", "😀", "中文", "x" * 100_000, "\x00", "\ud800"])
def test_text_without_known_words_gains_nothing(model: LearnedModel, text: str) -> None:
    assert model.gains(text).tolist() == pytest.approx([0.0, 0.0])


def test_surface_is_standardized_and_clipped(model: LearnedModel) -> None:
    words = SURFACE_FEATURES.index("words")
    weights = model.surface_weights.copy()
    weights[words, -1] = 0.1
    longer = replace(model, surface_weights=weights)
    assert longer.gains("one two three")[1] == pytest.approx(0.1 * np.log1p(3), rel=1e-5)
    # A text of 8,000 words is clipped at the limit.
    assert longer.gains("w " * 3_000)[1] == pytest.approx(0.1 * SURFACE_LIMIT, rel=1e-5)


def test_topics_add_their_quality_by_posterior(model: LearnedModel) -> None:
    columns = np.zeros((len(model.buckets), 5), np.float16)
    columns[:, 3:] = model.weights[:, 2:]
    two = replace(
        model,
        weights=columns,
        surface_weights=np.zeros((len(SURFACE_FEATURES), 5), np.float32),
        # The second topic is three times as likely.
        bias=np.array([0.0, 0.0, np.log(3.0), 0.5, 0.5], np.float32),
        topic_source=np.zeros(2, np.int32),
        topic_weights=np.array([[0.0, 0.0], [0.0, 0.4]], np.float32),
    )
    assert two.gains("prove")[1] == pytest.approx(0.5 + 0.75 * 0.4, abs=1e-3)


def two_sources(
    model: LearnedModel, logit: float, level: float, detail: float, weights: tuple[float, float]
) -> LearnedModel:
    """The first source's expert gains `level` + `detail`, the second's 0; the gate's logit of the first is `logit`."""
    rows, surface = len(model.buckets), len(SURFACE_FEATURES)
    return replace(
        model,
        sources=("first", "second"),
        idf=np.ones((rows, 3), np.float32),
        weights=np.zeros((rows, 8), np.float16),
        surface_mean=np.zeros((3, surface), np.float32),
        surface_scale=np.ones((3, surface), np.float32),
        surface_weights=np.zeros((surface, 8), np.float32),
        bias=np.array([logit, 0.0, 0.0, 0.0, 0.0, level + detail, 0.0, 0.0], np.float32),
        # A text without words deviates from the mean by the negated mean.
        centre=np.array([0.0, -detail, 0.0, 0.0], np.float32),
        topic_source=np.array([0, 1], np.int32),
        topic_weights=np.zeros((2, 2), np.float32),
        source_weights=np.array(weights, np.float32),
    )


def test_levels_mix_by_source_posterior(model: LearnedModel) -> None:
    mixed = two_sources(model, float(np.log(3)), level=1.0, detail=0.0, weights=(10.0, 10 / 9))
    assert mixed.gains("x")[1] == pytest.approx(3 / 4, rel=1e-5)


def test_details_mix_independently_of_source_size(model: LearnedModel) -> None:
    # The gate prefers the second source by the factor 9; that source has nine times the rows.
    mixed = two_sources(model, float(-np.log(9)), level=0.0, detail=1.0, weights=(10.0, 10 / 9))
    assert mixed.gains("x")[1] == pytest.approx(0.5, rel=1e-4)


def test_term_frequency_is_logarithmic() -> None:
    assert term_frequency(np.array([1, 10])).tolist() == pytest.approx([1.0, 1.0 + np.log(10)])


def test_standardized_clips_outliers() -> None:
    features = standardized(np.array([1e9, -1e9], np.float32), np.zeros(2, np.float32), np.ones(2, np.float32))
    assert features.tolist() == [SURFACE_LIMIT, -SURFACE_LIMIT]
