"""Computes the features of many texts at once, exactly as the router computes them for one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from router_gateway.routing.learned.features import BUCKETS, bucket_counts, surface_features
from router_gateway.routing.learned.model import FloatArray, standardized, term_frequency

# Nothing can be learned from a word that occurs in one text.
MIN_TEXTS = 2


@dataclass(frozen=True, eq=False)
class Texts:
    """The features of texts: word frequencies and surface features."""

    # [texts, buckets]: 1 + log(count)
    frequencies: sp.csr_array
    # [texts, surface]
    surface: FloatArray

    def __getitem__(self, rows: NDArray[Any]) -> Texts:
        return Texts(self.frequencies[rows], self.surface[rows])

    def __len__(self) -> int:
        return len(self.surface)


def extract(texts: Sequence[str]) -> Texts:
    """Returns the features of one text or more, in their order."""
    counted = [bucket_counts(text) for text in texts]
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in counted)])
    columns = np.concatenate([buckets for buckets, _ in counted])
    values = term_frequency(np.concatenate([counts for _, counts in counted]))
    frequencies = sp.csr_array((values, columns, ends), shape=(len(texts), BUCKETS))
    return Texts(frequencies, np.stack([surface_features(text) for text in texts]))


def shared_buckets(texts: Texts) -> NDArray[np.int32]:
    """Returns the buckets [rows] that occur in at least MIN_TEXTS texts, in rising order."""
    return np.flatnonzero(_texts_with(texts.frequencies) >= MIN_TEXTS).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Weighting:
    """The weights that a set of texts, all or one source's, gives to words and surface features."""

    # [rows]
    buckets: NDArray[np.int32]
    idf: FloatArray
    # [surface]
    surface_mean: FloatArray
    surface_scale: FloatArray

    def words(self, texts: Texts) -> sp.csr_array:
        """Returns tf-idf [texts, rows], with every text normalized to length 1."""
        weighted = texts.frequencies[:, self.buckets] @ sp.diags_array(self.idf)
        lengths = np.sqrt(weighted.multiply(weighted).sum(axis=1)).ravel()
        lengths[lengths == 0] = 1
        return (sp.diags_array(1 / lengths) @ weighted).tocsr()

    def surface(self, texts: Texts) -> FloatArray:
        """Returns standardized surface features [texts, surface]."""
        return standardized(texts.surface, self.surface_mean, self.surface_scale)


def measure_weighting(texts: Texts, buckets: NDArray[np.int32]) -> Weighting:
    """Measures the weighting of texts, with idf = log((1 + texts) / (1 + texts with the word)) + 1."""
    idf = np.log((1 + len(texts)) / (1 + _texts_with(texts.frequencies)[buckets])) + 1
    spread = texts.surface.std(axis=0)
    # A feature that never varies has no information; a scale of 1 avoids a division by 0.
    scale = np.where(spread > 0, spread, np.float32(1))
    return Weighting(buckets, idf.astype(np.float32), texts.surface.mean(axis=0), scale.astype(np.float32))


def _texts_with(frequencies: sp.csr_array) -> NDArray[np.int64]:
    """Returns the number of texts with each bucket, [buckets]."""
    counts: NDArray[np.int64] = np.bincount(frequencies.indices, minlength=BUCKETS)
    return counts
