"""A learned model with hand-made weights for single words, so that tests can calculate every gain."""

from __future__ import annotations

import numpy as np

from router_gateway.routing.learned.features import SURFACE_FEATURES, bucket_counts
from router_gateway.routing.learned.model import LearnedModel

SURFACE = len(SURFACE_FEATURES)


def bucket_of(word: str) -> int:
    """The bucket of a single word."""
    [bucket] = bucket_counts(word)[0].tolist()
    return int(bucket)


def word_model(gains: dict[str, float], routes: tuple[str, ...] = ("weak", "strong")) -> LearnedModel:
    """One source, one topic; a text of one known word gains `gains[word]` more on each costlier route."""
    words = sorted(gains, key=bucket_of)
    rungs = np.arange(len(routes))
    weights = np.array([[0.0, 0.0, *(gains[word] * rungs)] for word in words], np.float16)
    columns = weights.shape[1]
    return LearnedModel(
        routes=routes,
        sources=("made",),
        buckets=np.array([bucket_of(word) for word in words], np.int32),
        idf=np.ones((len(words), 2), np.float32),
        weights=weights,
        surface_mean=np.zeros((2, SURFACE), np.float32),
        surface_scale=np.ones((2, SURFACE), np.float32),
        surface_weights=np.zeros((SURFACE, columns), np.float32),
        bias=np.array([0.0, 0.0, *(0.5 for _ in routes)], np.float32),
        centre=np.zeros(len(routes), np.float32),
        topic_source=np.zeros(1, np.int32),
        topic_weights=np.zeros((1, len(routes)), np.float32),
        source_weights=np.ones(1, np.float32),
    )
