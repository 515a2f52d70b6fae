"""Fits a TextModel to labelled sets. Knows no file and no threshold.

Each source's expert is a ridge regression of every route's quality on words, topic and surface. It is linear, so the
difference of two routes is itself the ridge regression of the gain: one fit serves any number of routes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from router_gateway.routing.learned.model import FloatArray, LearnedModel
from stitch.errors import InvalidRequest
from stitch_training.labels import LabelledSet, Qualities, same_prompt
from stitch_training.router_classifier import Classifier, learn_sources, learn_topics
from stitch_training.router_features import Texts, View, learn_view, see, shared_buckets

PENALTY = 10.0
# Surface features are of size 1, a word of a text of a hundred words of size 0.1: so they count about alike.
SURFACE_WEIGHT = 0.05
# A task of fewer rows is not learned, but counts as the rest of its source.
LEAST_ROWS = 8


@dataclass(frozen=True, eq=False)
class Examples:
    """The rows of all sets, one after the other."""

    routes: tuple[str, ...]
    sources: tuple[str, ...]
    texts: Texts
    # [rows]; the index of the row's source, its topic, and what must not straddle a fold.
    source: NDArray[np.int64]
    topics: list[str]
    keys: list[str]
    # [rows, routes]
    qualities: Qualities

    def __getitem__(self, rows: NDArray[np.bool_]) -> Examples:
        taken = np.flatnonzero(rows).tolist()
        topics, keys = [self.topics[row] for row in taken], [self.keys[row] for row in taken]
        return Examples(
            self.routes, self.sources, self.texts[rows], self.source[rows], topics, keys, self.qualities[rows]
        )

    def __len__(self) -> int:
        return len(self.source)


def gather(sets: Sequence[LabelledSet]) -> Examples:
    """Raises InvalidRequest where two sets have one name."""
    names = tuple(labelled.name for labelled in sets)
    if len(set(names)) < len(names):
        raise InvalidRequest("data", list(names), "every file needs a name of its own")
    prompts = list(chain.from_iterable(labelled.prompts for labelled in sets))
    return Examples(
        sets[0].routes,
        names,
        see(prompts),
        np.repeat(np.arange(len(sets)), [len(labelled) for labelled in sets]),
        list(chain.from_iterable(labelled.topics for labelled in sets)),
        [same_prompt(prompt) for prompt in prompts],
        np.concatenate([labelled.qualities for labelled in sets]),
    )


def fit(examples: Examples) -> LearnedModel:
    """The model of all rows; every source has at least one."""
    buckets = shared_buckets(examples.texts)
    view = learn_view(examples.texts, buckets)
    names = [examples.sources[index] for index in examples.source]
    gate = learn_sources(view.words(examples.texts), view.surface(examples.texts), names)
    experts = [_fit_expert(examples[examples.source == index], buckets) for index in range(len(examples.sources))]
    return _assembled(examples, view, gate, experts)


@dataclass(frozen=True, eq=False)
class _Expert:
    """quality = words · word_weights + topics · topic_weights + surface · surface_weights + bias, in its own view."""

    view: View
    topics: Classifier
    # A column for every route.
    word_weights: FloatArray
    topic_weights: FloatArray
    surface_weights: FloatArray
    bias: FloatArray
    # [routes]: the mean of words and surface over the expert's rows.
    centre: FloatArray


def _fit_expert(examples: Examples, buckets: NDArray[np.int32]) -> _Expert:
    view = learn_view(examples.texts, buckets)
    words, surface = view.words(examples.texts), view.surface(examples.texts)
    topics, posterior = learn_topics(words, surface, common_topics(examples.topics))
    seen = sp.hstack([words, posterior, SURFACE_WEIGHT * surface]).tocsr()
    ridge = Ridge(alpha=PENALTY, solver="sparse_cg", max_iter=60, tol=1e-3).fit(seen, examples.qualities)
    weights, bias = ridge.coef_.T.astype(np.float32), ridge.intercept_.astype(np.float32)
    of_words, of_topics, of_surface = np.split(weights, [len(buckets), len(buckets) + posterior.shape[1]])
    of_surface *= np.float32(SURFACE_WEIGHT)
    centre = (words @ of_words + surface @ of_surface).mean(axis=0)
    return _Expert(view, topics, of_words, of_topics, of_surface, bias, centre)


def common_topics(topics: Sequence[str]) -> list[str]:
    """The same topics, rare ones (`source/task`) replaced by their source."""
    counts = Counter(topics)
    return [topic if counts[topic] >= LEAST_ROWS else topic.partition("/")[0] for topic in topics]


def _assembled(examples: Examples, whole: View, gate: Classifier, experts: Sequence[_Expert]) -> LearnedModel:
    views = [whole, *(expert.view for expert in experts)]
    # Column blocks in the model's order, each with its view.
    blocks: list[tuple[View, Classifier | _Expert]] = [
        (whole, _ordered(gate, examples.sources)),
        *((expert.view, expert.topics) for expert in experts),
        *((expert.view, expert) for expert in experts),
    ]
    return LearnedModel(
        routes=examples.routes,
        sources=examples.sources,
        buckets=whole.buckets,
        idf=np.stack([view.idf for view in views], axis=1),
        weights=np.hstack([view.idf[:, None] * block.word_weights for view, block in blocks]).astype(np.float16),
        surface_mean=np.stack([view.surface_mean for view in views]),
        surface_scale=np.stack([view.surface_scale for view in views]),
        surface_weights=np.hstack([block.surface_weights for _, block in blocks]).astype(np.float32),
        bias=np.concatenate([block.bias for _, block in blocks]).astype(np.float32),
        centre=np.concatenate([expert.centre for expert in experts]).astype(np.float32),
        topic_source=np.repeat(np.arange(len(experts)), [len(one.topics.classes) for one in experts]).astype(np.int32),
        topic_weights=np.concatenate([expert.topic_weights for expert in experts]).astype(np.float32),
        source_weights=(len(examples) / np.bincount(examples.source)).astype(np.float32),
    )


def _ordered(gate: Classifier, sources: Sequence[str]) -> Classifier:
    """The gate with its columns in the order of the sources."""
    order = np.searchsorted(gate.classes, sources)
    return Classifier(tuple(sources), gate.word_weights[:, order], gate.surface_weights[:, order], gate.bias[order])
