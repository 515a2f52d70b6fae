"""A text's expected quality on every route: a linear mixture of experts. Knows no file and no threshold.

x  = tf-idf of hashed words and pairs, Euclidean length 1             [buckets], sparse
f  = surface features, standardized, clipped                          [surface]
p  = softmax(x·Wp + f·Fp + bp)        which kind of task this looks like          [topics]
q  ∝ (p summed over each source) · c  which labelled set it looks like            [sources]
Qs = x·Ws + f·Fs + p·Ts + bs          quality on each route, by the expert of a source   [routes]
quality = Σ q_s Qs

Every set of labels is a source with an expert of its own, so sets that disagree don't dilute each other; a text that
looks like none takes a mixture. c = 1 / √(share of the source's rows), between a large set's rows counting in full
and all sets counting alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from router_gateway.routing.text.hashing import BUCKETS, bucket_counts
from router_gateway.routing.text.surface import surface

Floats: TypeAlias = NDArray[np.float32]

SURFACE_LIMIT = 4.0


@dataclass(frozen=True, eq=False)
class TextModel:
    """Weights; a column of `weights` is a topic's logit or, behind those, an expert's quality on one route."""

    # Cheapest first.
    routes: tuple[str, ...]
    # One for each set of labels that taught the model.
    sources: tuple[str, ...]
    # [rows], rising: the buckets that have weights.
    buckets: NDArray[np.int32]
    # [rows]
    idf: Floats
    # [rows, topics + sources x routes]
    weights: NDArray[np.float16]
    # [surface]
    surface_mean: Floats
    surface_scale: Floats
    # [surface, topics + sources x routes]
    surface_weights: Floats
    # [topics + sources x routes]
    bias: Floats
    # [topics, sources x routes]
    topic_weights: Floats
    # [topics, sources]: 1 where the topic is one of the source's.
    topic_sources: Floats
    # [sources]
    source_weights: Floats

    @cached_property
    def _row_of_bucket(self) -> NDArray[np.int32]:
        """[buckets + 1]: the row of every bucket, or -1."""
        rows = np.full(BUCKETS, -1, np.int32)
        rows[self.buckets] = np.arange(len(self.buckets), dtype=np.int32)
        return rows

    def qualities(self, text: str) -> Floats:
        """[routes]: what a text's answer is expected to be worth on every route, in the labels' unit."""
        seen = standardized(surface(text), self.surface_mean, self.surface_scale)
        linear = self._words(text) + seen @ self.surface_weights + self.bias
        topics = len(self.topic_sources)
        posterior = _softmax(linear[:topics])
        experts = linear[topics:] + posterior @ self.topic_weights
        source = (posterior @ self.topic_sources) * self.source_weights
        mixed: Floats = (source / source.sum()) @ experts.reshape(len(self.sources), len(self.routes))
        return mixed

    def gains(self, text: str) -> Floats:
        """[routes]: the same less the cheapest route's, so the first is 0."""
        qualities = self.qualities(text)
        return qualities - qualities[0]

    def _words(self, text: str) -> Floats:
        buckets, counts = bucket_counts(text)
        rows = self._row_of_bucket[buckets]
        known = rows >= 0
        rows = rows[known]
        values = tf_idf(counts[known], self.idf[rows])
        product: Floats = values @ self.weights[rows].astype(np.float32)
        return product


def tf_idf(counts: NDArray[np.int64], idf: Floats) -> Floats:
    """[words]: (1 + log count) · idf, scaled to the Euclidean length 1; empty stays empty."""
    values = (1.0 + np.log(counts)).astype(np.float32) * idf
    length = float(np.sqrt(values @ values))
    return values / np.float32(length) if length else values


def standardized(seen: Floats, mean: Floats, scale: Floats) -> Floats:
    """[..., surface]: in standard deviations of the training texts, clipped: a strange text stays in their range."""
    return np.clip((seen - mean) / scale, -SURFACE_LIMIT, SURFACE_LIMIT)


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max())
    result: Floats = powers / powers.sum()
    return result
