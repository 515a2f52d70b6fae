"""The features of many texts at once, exactly as the router computes them for one. Knows no label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from router_gateway.routing.learned.features import BUCKETS, bucket_counts, surface_features
from router_gateway.routing.learned.model import FloatArray, standardized, term_frequency

# A word of one text alone can't be learned from.
LEAST_TEXTS = 2


@dataclass(frozen=True, eq=False)
class Texts:
    """What can be seen in texts without labels."""

    # [texts, buckets]: 1 + log(count)
    frequencies: sp.csr_array
    # [texts, surface]
    surface: FloatArray

    def __getitem__(self, rows: NDArray[Any]) -> Texts:
        return Texts(self.frequencies[rows], self.surface[rows])

    def __len__(self) -> int:
        return len(self.surface)


def see(texts: Sequence[str]) -> Texts:
    """All features of texts, in their order; at least one text."""
    seen = [bucket_counts(text) for text in texts]
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in seen)])
    columns = np.concatenate([buckets for buckets, _ in seen])
    values = term_frequency(np.concatenate([counts for _, counts in seen]))
    frequencies = sp.csr_array((values, columns, ends), shape=(len(texts), BUCKETS))
    return Texts(frequencies, np.stack([surface_features(text) for text in texts]))


def shared_buckets(texts: Texts) -> NDArray[np.int32]:
    """[rows], rising: the buckets of at least LEAST_TEXTS texts."""
    return np.flatnonzero(_texts_with(texts.frequencies) >= LEAST_TEXTS).astype(np.int32)


@dataclass(frozen=True, eq=False)
class View:
    """How some texts, all of them or a source's, weigh words and surfaces."""

    # [rows]
    buckets: NDArray[np.int32]
    idf: FloatArray
    # [surface]
    surface_mean: FloatArray
    surface_scale: FloatArray

    def words(self, texts: Texts) -> sp.csr_array:
        """[texts, rows]: tf-idf, every text of length 1."""
        weighed = texts.frequencies[:, self.buckets] @ sp.diags_array(self.idf)
        lengths = np.sqrt(weighed.multiply(weighed).sum(axis=1)).ravel()
        lengths[lengths == 0] = 1
        return (sp.diags_array(1 / lengths) @ weighed).tocsr()

    def surface(self, texts: Texts) -> FloatArray:
        """[texts, surface], standardized."""
        return standardized(texts.surface, self.surface_mean, self.surface_scale)


def learn_view(texts: Texts, buckets: NDArray[np.int32]) -> View:
    """idf = log((1 + texts) / (1 + texts with the word)) + 1."""
    idf = np.log((1 + len(texts)) / (1 + _texts_with(texts.frequencies)[buckets])) + 1
    spread = texts.surface.std(axis=0)
    # A feature that never varied says nothing, whatever it becomes later; its scale must only not be 0.
    scale = np.where(spread > 0, spread, np.float32(1))
    return View(buckets, idf.astype(np.float32), texts.surface.mean(axis=0), scale.astype(np.float32))


def _texts_with(frequencies: sp.csr_array) -> NDArray[np.int64]:
    """[buckets]"""
    counts: NDArray[np.int64] = np.bincount(frequencies.indices, minlength=BUCKETS)
    return counts
