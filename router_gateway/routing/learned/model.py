"""A text's expected quality on every route, by a linear mixture of experts.

In goes a text, out comes one quality a route, cheapest first, in the unit of the training labels. A model is immutable.

x_v = tf-idf of hashed words and pairs, Euclidean length 1            [buckets], sparse
f_v = surface features, standardized, clipped                         [surface]
r   = softmax(x_0·W_0 + f_0·F_0 + b_0)    which labelled set a text looks like          [sources]
q_s ∝ r_s / the share of s in the training rows, sums to 1                              [sources]
p_s = softmax(x_s·U_s + f_s·G_s + c_s)    which of its tasks                            [topics of s]
L_s = b_s + m_s + p_s·T_s                 level: mean quality of such a task's texts    [routes]
D_s = x_s·W_s + f_s·F_s - m_s             detail: how this text differs from them       [routes]
quality = Σ r_s L_s + Σ q_s D_s

m_s is the mean of x_s·W_s + f_s·F_s over the source's rows, so that D_s is 0 on average. View 0 weighs words and
surfaces as all training texts have them, view s as the texts of source s do. Every set of labels is a source with an
expert of its own, fitted as if it were the only one, so that disagreeing sets don't dilute each other. Where sets look
alike, a level is an average over training rows, but a detail comes from the set whose texts are similar, however small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from router_gateway.routing.learned.features import BUCKETS, bucket_counts, surface_features

FloatArray: TypeAlias = NDArray[np.float32]

# Standardized surface features are clipped here.
SURFACE_LIMIT = 4.0


@dataclass(frozen=True, eq=False)
class LearnedModel:
    """Weights. The columns are the sources' logits, then the topics', then each expert's quality on every route."""

    # Cheapest first.
    routes: tuple[str, ...]
    # One for each set of training labels.
    sources: tuple[str, ...]
    # [rows], rising: the buckets that have weights.
    buckets: NDArray[np.int32]
    # [rows, views]
    idf: FloatArray
    # [rows, columns], the idf of the column's view already multiplied in.
    weights: NDArray[np.float16]
    # [views, surface]
    surface_mean: FloatArray
    surface_scale: FloatArray
    # [surface, columns]
    surface_weights: FloatArray
    # [columns]
    bias: FloatArray
    # [sources x routes]: the mean of an expert's linear term, without its bias, over its source's rows.
    centre: FloatArray
    # [topics], rising: the index of the topic's source; each source has at least one.
    topic_source: NDArray[np.int32]
    # [topics, routes]: what the topic adds to its expert's quality.
    topic_weights: FloatArray
    # [sources]: 1 / the share of the training rows.
    source_weights: FloatArray

    @cached_property
    def _row_of_bucket(self) -> NDArray[np.int32]:
        """[buckets]: the row of every bucket, or -1."""
        rows = np.full(BUCKETS, -1, np.int32)
        rows[self.buckets] = np.arange(len(self.buckets), dtype=np.int32)
        return rows

    @cached_property
    def _view_of_column(self) -> NDArray[np.int64]:
        """[columns]"""
        experts = np.arange(len(self.sources), dtype=np.int64)
        of_topics = 1 + self.topic_source.astype(np.int64)
        return np.concatenate([0 * experts, of_topics, 1 + np.repeat(experts, len(self.routes))])

    @cached_property
    def _first_topic(self) -> NDArray[np.int64]:
        """[sources]: where each source's topics begin."""
        return np.searchsorted(self.topic_source, np.arange(len(self.sources)))

    def qualities(self, text: str) -> FloatArray:
        """[routes]: the expected quality of a text's answer on every route, in the labels' unit."""
        linear = self._words(text) + self._surface(text)
        sources, topics = len(self.sources), len(self.topic_source)
        gate, tasks, experts = np.split(linear, [sources, sources + topics])
        gate_bias, task_bias, expert_bias = np.split(self.bias, [sources, sources + topics])
        by_topic = self._topic_posterior(tasks + task_bias)[:, None] * self.topic_weights
        summed: FloatArray = np.add.reduceat(by_topic, self._first_topic)
        shape = sources, len(self.routes)
        levels, details = (expert_bias + self.centre).reshape(shape) + summed, (experts - self.centre).reshape(shape)
        posterior, even = self._source_posteriors(gate + gate_bias)
        mixed: FloatArray = posterior @ levels + even @ details
        return mixed

    def gains(self, text: str) -> FloatArray:
        """[routes]: each route's quality minus the cheapest route's, so the first is 0."""
        return gains_of(self.qualities(text))

    def _topic_posterior(self, logits: FloatArray) -> FloatArray:
        """[topics], sums to 1 within every source."""
        highest: FloatArray = np.maximum.reduceat(logits, self._first_topic)
        powers: FloatArray = np.exp(logits - highest[self.topic_source])
        sums: FloatArray = np.add.reduceat(powers, self._first_topic)
        posterior: FloatArray = powers / sums[self.topic_source]
        return posterior

    def _source_posteriors(self, logits: FloatArray) -> tuple[FloatArray, FloatArray]:
        """r and q, [sources] each."""
        powers: FloatArray = np.exp(logits - logits.max())
        weighed = powers * self.source_weights
        return powers / powers.sum(), weighed / weighed.sum()

    def _words(self, text: str) -> FloatArray:
        """[columns]: the contribution of words and word pairs."""
        buckets, counts = bucket_counts(text)
        rows = self._row_of_bucket[buckets]
        has_weights = rows >= 0
        rows, frequencies = rows[has_weights], term_frequency(counts[has_weights])
        squares = np.square(frequencies) @ np.square(self.idf[rows])
        # A text without any known word would divide by 0.
        lengths = np.sqrt(np.where(squares > 0, squares, 1)).astype(np.float32)
        weighted: FloatArray = frequencies @ self.weights[rows].astype(np.float32)
        scaled: FloatArray = weighted / lengths[self._view_of_column]
        return scaled

    def _surface(self, text: str) -> FloatArray:
        """[columns]: the contribution of the surface features."""
        features = standardized(surface_features(text), self.surface_mean, self.surface_scale)
        by_view: FloatArray = (features @ self.surface_weights)[self._view_of_column, np.arange(len(self.bias))]
        return by_view


def gains_of(qualities: FloatArray) -> FloatArray:
    """[routes]: each quality minus the first, which is the cheapest route's."""
    gains: FloatArray = qualities - qualities[0]
    return gains


def term_frequency(counts: NDArray[np.int64]) -> FloatArray:
    """1 + log(count): the tenth occurrence of a word counts less than the second."""
    return (1.0 + np.log(counts)).astype(np.float32)


def standardized(features: FloatArray, mean: FloatArray, scale: FloatArray) -> FloatArray:
    """[..., surface]: in standard deviations of the training texts, clipped so that an outlier stays in their range."""
    clipped: FloatArray = np.clip((features - mean) / scale, -SURFACE_LIMIT, SURFACE_LIMIT)
    return clipped
