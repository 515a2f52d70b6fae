"""Classifies texts by source (the file of labels) and, within a source, by task.

Both classifiers are multinomial logistic regressions. Sources differ in single words and signs, so the source
classifier is on words; tasks differ in subject, so the task classifier is on a latent semantic analysis (a truncated
singular value decomposition of the tf-idf matrix), which is linear and folds into one weight per word and class.
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
# Scale of the surface features against words, which separate most classes.
SURFACE_WEIGHT = 0.1
MOST_ITERATIONS = 40
INNER_FOLDS = 4
# The logit of a class without rows.
_ABSENT = -30.0


@dataclass(frozen=True, eq=False)
class Classifier:
    """logits = words · word_weights + surface · surface_weights + bias, with one column per class."""

    # Sorted.
    classes: tuple[str, ...]
    word_weights: FloatArray
    surface_weights: FloatArray
    bias: FloatArray


def train_sources(words: sp.csr_array, surface: FloatArray, labels: Sequence[str]) -> Classifier:
    """Trains on words [texts, rows] and surface [texts, surface], with few classes and many texts of each."""
    classes = tuple(sorted(set(labels)))
    if len(classes) == 1:
        return _constant(classes, words, surface)[0]
    features = sp.hstack([words, SURFACE_WEIGHT * surface]).tocsr()
    weights, bias = _fit(features, np.searchsorted(classes, labels), len(classes), SOURCE_INVERSE_PENALTY)
    return _classifier(classes, weights[: words.shape[1]], weights[words.shape[1] :], bias)


def train_topics(words: sp.csr_array, surface: FloatArray, labels: Sequence[str]) -> tuple[Classifier, FloatArray]:
    """Trains on words [texts, rows] and surface [texts, surface].

    Returns the classifier, and for every text the posterior [texts, classes] by one that was not trained on it.
    """
    classes = tuple(sorted(set(labels)))
    if len(classes) == 1:
        return _constant(classes, words, surface)
    axes = _axes(words)
    features = np.hstack([words @ axes, SURFACE_WEIGHT * surface])
    index = np.searchsorted(classes, labels)
    posterior = _cross_fit(features, index, len(classes))
    weights, bias = _fit(features, index, len(classes))
    dimensions = axes.shape[1]
    return _classifier(classes, axes @ weights[:dimensions], weights[dimensions:], bias), posterior


def _constant(classes: tuple[str, ...], words: sp.csr_array, surface: FloatArray) -> tuple[Classifier, FloatArray]:
    word_weights, surface_weights = (np.zeros((one.shape[1], 1), np.float32) for one in (words, surface))
    classifier = Classifier(classes, word_weights, surface_weights, np.zeros(1, np.float32))
    return classifier, np.ones((len(surface), 1), np.float32)


def _axes(words: sp.csr_array) -> Values:
    """Returns the directions [rows, dimensions] in which texts differ most."""
    dimensions = max(min(DIMENSIONS, *(size - 1 for size in words.shape)), 1)
    axes: Values = randomized_svd(words, dimensions, n_iter=2, random_state=0)[2].T
    return axes


def _fit(
    features: Values | sp.csr_array, index: NDArray[Any], classes: int, inverse_penalty: float = INVERSE_PENALTY
) -> tuple[Values, Values]:
    """Returns weights [dimensions + surface, classes] and bias [classes]."""
    weights, bias = np.zeros((features.shape[1], classes)), np.full(classes, _ABSENT)
    present = np.unique(index)
    if len(present) == 1:
        bias[present] = 0
        return weights, bias
    model = LogisticRegression(C=inverse_penalty, max_iter=MOST_ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        # Stopping early is intended: later iterations don't change held-out figures.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, index)
    # For two classes scikit-learn has the logit of the second alone.
    is_binary = len(present) == 2
    weights[:, present] = np.vstack([np.zeros_like(model.coef_), model.coef_]).T if is_binary else model.coef_.T
    bias[present] = [0.0, *model.intercept_] if is_binary else model.intercept_
    return weights, bias


def _cross_fit(features: Values, index: NDArray[Any], classes: int) -> FloatArray:
    fold = np.random.default_rng(0).permutation(len(features)) % INNER_FOLDS
    posterior = np.zeros((len(features), classes), np.float32)
    for held in range(INNER_FOLDS):
        weights, bias = _fit(features[fold != held], index[fold != held], classes)
        logits = features[fold == held] @ weights + bias
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        posterior[fold == held] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return posterior


def _classifier(classes: tuple[str, ...], words: Values, surface: Values, bias: Values) -> Classifier:
    """Folds the surface's scale into its weights [surface, classes]; `words` are [rows, classes]."""
    scaled = SURFACE_WEIGHT * surface
    return Classifier(classes, words.astype(np.float32), scaled.astype(np.float32), bias.astype(np.float32))
