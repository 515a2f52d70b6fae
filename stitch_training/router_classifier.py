"""Learns to tell kinds of texts apart: a source from the others, a task from a source's others. Knows no quality.

Both are multinomial logistic regressions. Sources differ in single words and signs, so theirs is on words themselves;
tasks differ in what they are about, so theirs is on a latent semantic analysis (a truncated singular value
decomposition of the tf-idf matrix), which is linear and folds into one weight for every word and class.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.extmath import randomized_svd

from router_gateway.routing.learned.model import FloatArray

Values: TypeAlias = NDArray[np.floating[Any]]

DIMENSIONS = 120
INVERSE_PENALTY = 20.0
SOURCE_INVERSE_PENALTY = 3.0
# The surface's share in what tells classes apart; words do most of it.
SURFACE_WEIGHT = 0.1
MOST_ITERATIONS = 40
INNER_FOLDS = 4
# The logit of a class without rows: as good as impossible.
_ABSENT = -30.0


@dataclass(frozen=True, eq=False)
class Classifier:
    """logits = words · word_weights + surface · surface_weights + bias, each with a column for every class."""

    # Sorted.
    classes: tuple[str, ...]
    word_weights: FloatArray
    surface_weights: FloatArray
    bias: FloatArray


def learn_sources(words: sp.csr_array, surface: FloatArray, labels: Sequence[str]) -> Classifier:
    """The classifier of [texts, rows] and [texts, surface] with few classes and many texts of each."""
    classes = tuple(sorted(set(labels)))
    if len(classes) == 1:
        return _constant(classes, words, surface)[0]
    seen = sp.hstack([words, SURFACE_WEIGHT * surface]).tocsr()
    weights, bias = _fit(seen, np.searchsorted(classes, labels), len(classes), SOURCE_INVERSE_PENALTY)
    return _classifier(classes, weights[: words.shape[1]], weights[words.shape[1] :], bias)


def learn_topics(words: sp.csr_array, surface: FloatArray, labels: Sequence[str]) -> tuple[Classifier, FloatArray]:
    """The classifier, and the posterior [texts, classes] of every text by one that has not seen it.

    Words are [texts, rows], surfaces [texts, surface].
    """
    classes = tuple(sorted(set(labels)))
    if len(classes) == 1:
        return _constant(classes, words, surface)
    axes = _axes(words)
    seen = np.hstack([words @ axes, SURFACE_WEIGHT * surface])
    index = np.searchsorted(classes, labels)
    posterior = _cross_fitted(seen, index, len(classes))
    weights, bias = _fit(seen, index, len(classes))
    dimensions = axes.shape[1]
    return _classifier(classes, axes @ weights[:dimensions], weights[dimensions:], bias), posterior


def _constant(classes: tuple[str, ...], words: sp.csr_array, surface: FloatArray) -> tuple[Classifier, FloatArray]:
    of_words, of_surface = (np.zeros((part.shape[1], 1), np.float32) for part in (words, surface))
    classifier = Classifier(classes, of_words, of_surface, np.zeros(1, np.float32))
    return classifier, np.ones((len(surface), 1), np.float32)


def _axes(words: sp.csr_array) -> Values:
    """[rows, dimensions]: the directions in which texts differ most."""
    dimensions = max(min(DIMENSIONS, *(size - 1 for size in words.shape)), 1)
    axes: Values = randomized_svd(words, dimensions, n_iter=2, random_state=0)[2].T
    return axes


def _fit(
    seen: Values | sp.csr_array, index: NDArray[Any], classes: int, inverse_penalty: float = INVERSE_PENALTY
) -> tuple[Values, Values]:
    """Weights [dimensions + surface, classes] and bias [classes]."""
    weights, bias = np.zeros((seen.shape[1], classes)), np.full(classes, _ABSENT)
    present = np.unique(index)
    if len(present) == 1:
        bias[present] = 0
        return weights, bias
    model = LogisticRegression(C=inverse_penalty, max_iter=MOST_ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        # Stopping early is meant: later steps change held-out figures no more.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(seen, index)
    # Of two classes scikit-learn keeps the second's logit alone.
    two = len(present) == 2
    weights[:, present] = np.vstack([np.zeros_like(model.coef_), model.coef_]).T if two else model.coef_.T
    bias[present] = [0.0, *model.intercept_] if two else model.intercept_
    return weights, bias


def _cross_fitted(seen: Values, index: NDArray[Any], classes: int) -> FloatArray:
    fold = np.random.default_rng(0).permutation(len(seen)) % INNER_FOLDS
    posterior = np.zeros((len(seen), classes), np.float32)
    for held in range(INNER_FOLDS):
        weights, bias = _fit(seen[fold != held], index[fold != held], classes)
        logits = seen[fold == held] @ weights + bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        posterior[fold == held] = powers / powers.sum(axis=1, keepdims=True)
    return posterior


def _classifier(classes: tuple[str, ...], of_words: Values, of_surface: Values, bias: Values) -> Classifier:
    """With weights [rows, classes] and, for the surface as it was fitted on, [surface, classes]."""
    scaled = SURFACE_WEIGHT * of_surface
    return Classifier(classes, of_words.astype(np.float32), scaled.astype(np.float32), bias.astype(np.float32))
