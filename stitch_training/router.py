"""Trains and evaluates the learned router: from labelled prompts to the artifact that a gateway reads.

Each source of labels has an expert, a ridge regression of every route's quality on words, topic and surface features.
It is linear, so the difference of two routes is itself the ridge regression of the gain: one fit serves any number of
routes. The target is the gain or its rank, whichever ranks better out of fold (`router_targets`). Cross-validated
figures are of rows whose fold the model was not trained on; `cross_validate` chooses the target within the other folds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of, load_router, save_router
from router_gateway.routing.learned.model import FloatArray, LearnedModel
from stitch.errors import InvalidRequest
from stitch.thresholds import choose_routes
from stitch_training.calibration import calibrate, percentiles, relative_costs
from stitch_training.labels import LabelledSet, folds, prompt_key, read_labels
from stitch_training.recovery import Float64Array
from stitch_training.report import (
    Rankings,
    SourceRankings,
    as_json,
    curve_table,
    draw_lines,
    plot_curves,
    rank_pairs,
    rank_sources,
    table,
    training_record,
    write_json,
)
from stitch_training.router_classifier import Classifier, train_sources, train_topics
from stitch_training.router_features import Texts, Weighting, extract, measure_weighting, shared_buckets
from stitch_training.router_targets import TARGETS, Target, best_target, target_qualities

PENALTY = 10.0
# Surface features are of size 1, a word in a text of a hundred words of size 0.1; this weighs them about alike.
SURFACE_WEIGHT = 0.05
# A task with fewer rows is not learned as a topic; its rows belong to the rest of the source.
MIN_TASK_ROWS = 8
FOLDS = 5
# Folds in which a target is chosen, within its training rows.
INNER_FOLDS = 3
# The budget of a new router until it is calibrated: half way from cheapest to costliest.
INITIAL_BUDGET = 0.5


@dataclass(frozen=True, eq=False)
class Examples:
    """The rows of all sets, one set after the other."""

    routes: tuple[str, ...]
    sources: tuple[str, ...]
    prompts: list[str]
    texts: Texts
    # [rows]: index of the row's source, its topic, and the key whose rows share a fold.
    source: NDArray[np.int64]
    topics: list[str]
    keys: list[str]
    # [rows, routes]
    qualities: Float64Array

    def __getitem__(self, rows: NDArray[np.bool_]) -> Examples:
        indices = np.flatnonzero(rows).tolist()
        prompts, topics, keys = ([of[row] for row in indices] for of in (self.prompts, self.topics, self.keys))
        texts, source, qualities = self.texts[rows], self.source[rows], self.qualities[rows]
        return Examples(self.routes, self.sources, prompts, texts, source, topics, keys, qualities)

    def __len__(self) -> int:
        return len(self.source)


def gather(sets: Sequence[LabelledSet]) -> Examples:
    """Concatenates sets. Raises InvalidRequest where two sets have one name."""
    names = tuple(labelled.name for labelled in sets)
    if len(set(names)) < len(names):
        raise InvalidRequest("data", list(names), "every file needs its own name")
    prompts = list(chain.from_iterable(labelled.prompts for labelled in sets))
    return Examples(
        sets[0].routes,
        names,
        prompts,
        extract(prompts),
        np.repeat(np.arange(len(sets)), [len(labelled) for labelled in sets]),
        list(chain.from_iterable(labelled.topics for labelled in sets)),
        [prompt_key(prompt) for prompt in prompts],
        np.concatenate([labelled.qualities for labelled in sets]),
    )


def fit(examples: Examples, target: Target = "gain") -> LearnedModel:
    """Fits the model on all rows; every source has at least one."""
    return fit_targets(examples, (target,))[target]


def fit_targets(examples: Examples, targets: Sequence[Target] = TARGETS) -> dict[Target, LearnedModel]:
    """Fits one model for each target; they share their classifiers."""
    buckets = shared_buckets(examples.texts)
    weighting = measure_weighting(examples.texts, buckets)
    names = [examples.sources[index] for index in examples.source]
    gate = train_sources(weighting.words(examples.texts), weighting.surface(examples.texts), names)
    by_source = [
        _fit_experts(examples[examples.source == index], buckets, targets) for index in range(len(examples.sources))
    ]
    return {
        target: _assemble(examples, weighting, gate, [experts[target] for experts in by_source]) for target in targets
    }


@dataclass(frozen=True, eq=False)
class _Expert:
    """quality = words · word_weights + topics · topic_weights + surface · surface_weights + bias, for one source."""

    weighting: Weighting
    topics: Classifier
    # One column per route.
    word_weights: FloatArray
    topic_weights: FloatArray
    surface_weights: FloatArray
    bias: FloatArray
    # [routes]: mean contribution of words and surface over the expert's rows.
    centre: FloatArray


def _fit_experts(examples: Examples, buckets: NDArray[np.int32], targets: Sequence[Target]) -> dict[Target, _Expert]:
    weighting = measure_weighting(examples.texts, buckets)
    words, surface = weighting.words(examples.texts), weighting.surface(examples.texts)
    topics, posterior = train_topics(words, surface, common_topics(examples.topics))
    features = sp.hstack([words, posterior, SURFACE_WEIGHT * surface]).tocsr()
    splits = [len(buckets), len(buckets) + posterior.shape[1]]

    def fit_expert(target: Target) -> _Expert:
        qualities = target_qualities(examples.qualities, target)
        ridge = Ridge(alpha=PENALTY, solver="sparse_cg", max_iter=60, tol=1e-3).fit(features, qualities)
        weights, bias = ridge.coef_.T.astype(np.float32), ridge.intercept_.astype(np.float32)
        word_weights, topic_weights, surface_weights = np.split(weights, splits)
        surface_weights *= np.float32(SURFACE_WEIGHT)
        centre = (words @ word_weights + surface @ surface_weights).mean(axis=0)
        return _Expert(weighting, topics, word_weights, topic_weights, surface_weights, bias, centre)

    return {target: fit_expert(target) for target in targets}


def common_topics(topics: Sequence[str]) -> list[str]:
    """Returns the topics (`source/task`) with rare ones replaced by their source."""
    counts = Counter(topics)
    return [topic if counts[topic] >= MIN_TASK_ROWS else topic.partition("/")[0] for topic in topics]


def _assemble(examples: Examples, whole: Weighting, gate: Classifier, experts: Sequence[_Expert]) -> LearnedModel:
    weightings = [whole, *(expert.weighting for expert in experts)]
    # Column blocks in the model's order, each with its weighting.
    blocks: list[tuple[Weighting, Classifier | _Expert]] = [
        (whole, _reorder(gate, examples.sources)),
        *((expert.weighting, expert.topics) for expert in experts),
        *((expert.weighting, expert) for expert in experts),
    ]
    weights = np.hstack([weighting.idf[:, None] * block.word_weights for weighting, block in blocks])
    topic_counts = [len(one.topics.classes) for one in experts]
    return LearnedModel(
        routes=examples.routes,
        sources=examples.sources,
        buckets=whole.buckets,
        idf=np.stack([weighting.idf for weighting in weightings], axis=1),
        weights=weights.astype(np.float16),
        surface_mean=np.stack([weighting.surface_mean for weighting in weightings]),
        surface_scale=np.stack([weighting.surface_scale for weighting in weightings]),
        surface_weights=np.hstack([block.surface_weights for _, block in blocks]).astype(np.float32),
        bias=np.concatenate([block.bias for _, block in blocks]).astype(np.float32),
        centre=np.concatenate([expert.centre for expert in experts]).astype(np.float32),
        topic_source=np.repeat(np.arange(len(experts)), topic_counts).astype(np.int32),
        topic_weights=np.concatenate([expert.topic_weights for expert in experts]).astype(np.float32),
        source_weights=(len(examples) / np.bincount(examples.source)).astype(np.float32),
    )


def _reorder(gate: Classifier, sources: Sequence[str]) -> Classifier:
    """Returns the gate with its columns in the order of the sources."""
    order = np.searchsorted(gate.classes, sources)
    return Classifier(tuple(sources), gate.word_weights[:, order], gate.surface_weights[:, order], gate.bias[order])


def cross_validated_gains(
    examples: Examples,
    count: int = FOLDS,
    targets: Sequence[Target] = TARGETS,
    seed: int = 0,
    progress: Callable[[int], None] = lambda fold: None,
) -> dict[Target, Float64Array]:
    """Returns by target gains [rows, routes], first column 0, of every row by a model of the other folds.

    `progress` is called with the number of finished folds.
    """
    fold = folds(examples.keys, count, seed)
    gains = {target: np.zeros(examples.qualities.shape) for target in targets}
    for held_out in range(count):
        for target, model in fit_targets(examples[fold != held_out], targets).items():
            gains[target][fold == held_out] = _gains(model, examples.prompts, fold == held_out)
        progress(held_out + 1)
    return gains


def _gains(model: LearnedModel, prompts: Sequence[str], rows: NDArray[np.bool_]) -> Float64Array:
    return np.array([model.gains(prompts[row]) for row in np.flatnonzero(rows).tolist()], np.float64)


def nested_gains(
    examples: Examples, count: int, seed: int, progress: Callable[[int], None] = lambda fold: None
) -> tuple[Float64Array, list[Target]]:
    """Returns the gains [rows, routes] of every row by a model of the other folds, and each fold's target.

    The target is chosen within the other folds too, so the figures of these gains have not seen a row's label.
    """
    fold, gains, chosen = folds(examples.keys, count, seed), np.zeros(examples.qualities.shape), []
    for held_out in range(count):
        training = examples[fold != held_out]
        unseen = cross_validated_gains(training, INNER_FOLDS, seed=seed)
        target, _ = best_target(training.source, unseen, training.qualities)
        gains[fold == held_out] = _gains(fit(training, target), examples.prompts, fold == held_out)
        chosen.append(target)
        progress(held_out + 1)
    return gains, chosen


def train(data: Sequence[Path], out: Path, routes: tuple[str, ...], renamed: Mapping[str, str], count: int) -> None:
    """Writes the artifact of all rows, and prints the figures of a cross-validation with `count` folds.

    Raises InvalidRequest where the data, the routes or the number of folds is invalid.
    """
    check_training(routes, count)
    sets = [read_labels(path, routes, renamed) for path in data]
    examples = gather(sets)
    by_target = cross_validated_gains(examples, count, progress=_fold_reporter(count))
    target, figures = best_target(examples.source, by_target, examples.qualities)
    gains = by_target[target]
    found = rank_sources(sets, gains)
    _print_rankings(found, "rows unseen")
    print(f"target: {target}; mean APGR {figures}")
    model = fit(examples, target)
    record = {**training_record(sets, found), "folds": count, "target": target, "mean_apgr": figures}
    artifact = RouterArtifact(
        model=model,
        thresholds=calibrate(gains, relative_costs(routes, None), INITIAL_BUDGET).thresholds,
        gain_percentiles=percentiles(gains[:, -1]),
        training=record,
        fingerprint=fingerprint_of(model),
    )
    save_router(artifact, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, fingerprint {artifact.fingerprint[:12]}")


def cross_validate(
    data: Sequence[Path],
    routes: tuple[str, ...],
    renamed: Mapping[str, str],
    count: int,
    seed: int,
    draws: int,
    plot: Path | None,
    out: Path | None,
) -> None:
    """Prints the figures of routers that were trained on the other folds of each row, each file's and all files'.

    Those with intervals, and the curves, are of the folds that `seed` draws; with more `draws` it repeats all with the
    seeds after it, and prints the means. Draws curves and writes JSON where requested. Raises InvalidRequest where the
    data, the routes or the number of folds or draws is invalid.
    """
    check_training(routes, count)
    if draws < 1:
        raise InvalidRequest("draws", draws, "it must be at least 1")
    sets = [read_labels(path, routes, renamed) for path in data]
    examples = gather(sets)
    gains, targets = nested_gains(examples, count, seed, _fold_reporter(count))
    found = rank_sources(sets, gains)
    _print_rankings(found, "rows unseen")
    print(f"targets of the folds: {', '.join(targets)}")
    by_draw = [training_record(sets, found)]
    for more in range(seed + 1, seed + draws):
        gains, _ = nested_gains(examples, count, more, _fold_reporter(count))
        by_draw.append(training_record(sets, rank_sources(sets, gains)))
    unseen = [record["unseen"] for record in by_draw]
    if draws > 1:
        print("\n".join(draw_lines(unseen)))
    for name, pairs in found.items():
        if plot is not None:
            plot_curves(pairs, plot.with_stem(f"{plot.stem}-{name.replace(' ', '-')}") if len(found) > 1 else plot)
    if out is not None:
        record = {"folds": count, "seed": seed, "targets": targets, "data": by_draw[0]["data"], "draws": unseen}
        quality = {one.name: dict(zip(routes, one.qualities.mean(axis=0).tolist(), strict=True)) for one in sets}
        pairs_by_source = {name: as_json(pairs) for name, pairs in found.items()}
        write_json(out, {**record, "quality": quality, "unseen": pairs_by_source})


def _print_rankings(found: SourceRankings, rows: str) -> None:
    for source, pairs in found.items():
        for pair, rankings in pairs.items():
            print(table(f"{source}, {pair}, {rows}:", rankings), end="\n\n")


def _fold_reporter(count: int) -> Callable[[int], None]:
    return lambda done: print(f"fold {done} of {count}", file=sys.stderr)


def check_training(routes: tuple[str, ...], count: int) -> None:
    """Raises InvalidRequest for routes or folds that can't be trained on."""
    if len(set(routes)) < max(len(routes), 2) or not all(routes):
        raise InvalidRequest("routes", ",".join(routes), "there must be two or more, each named once")
    if count < 2:
        raise InvalidRequest("folds", count, "it must be at least 2")


def evaluate(
    router: Path, data: Sequence[Path], renamed: Mapping[str, str], plot: Path | None, out: Path | None
) -> None:
    """Prints an artifact's figures on every file of labelled prompts; draws curves and writes JSON where requested.

    Raises InvalidRequest where the artifact or the data is invalid.
    """
    artifact = load_router(router)
    report: dict[str, Any] = {"router": artifact.fingerprint, "data": {}}
    for path in data:
        labelled = read_labels(path, artifact.model.routes, renamed)
        was_trained_on = _was_trained_on(artifact, labelled)
        if was_trained_on:
            warning = "the router was trained on this very file, so its figures flatter it"
            print(f"{labelled.name}: {warning}", file=sys.stderr)
        found, at_thresholds = _measure(artifact, labelled)
        report["data"][labelled.name] = {
            "sha256": labelled.fingerprint,
            "rows": len(labelled),
            "seen_in_training": was_trained_on,
            "pairs": as_json(found),
            "at_thresholds": at_thresholds,
        }
        if plot is not None:
            plot_curves(found, plot.with_stem(f"{plot.stem}-{labelled.name}") if len(data) > 1 else plot)
    if out is not None:
        write_json(out, report)


def _measure(artifact: RouterArtifact, labelled: LabelledSet) -> tuple[dict[str, Rankings], dict[str, Any]]:
    """Returns and prints the rankings of every pair, and the shares and quality at the artifact's own thresholds."""
    gains = np.array([artifact.model.gains(prompt) for prompt in labelled.prompts], np.float64)
    found = rank_pairs(labelled.routes, gains, labelled.prompts, labelled.qualities)
    for pair, rankings in found.items():
        print(table(f"{labelled.name}, {pair}, {len(labelled):,} rows:", rankings))
        print(curve_table(rankings["router"]), end="\n\n")
    routes = choose_routes(gains, np.array(artifact.thresholds))
    shares = np.bincount(routes, minlength=len(labelled.routes)) / len(labelled)
    by_route = dict(zip(labelled.routes, shares.tolist(), strict=True))
    quality = float(labelled.qualities[np.arange(len(routes)), routes].mean())
    text = ", ".join(f"{route} {share:.0%}" for route, share in by_route.items())
    print(f"at the artifact's own thresholds: {text}; mean quality {quality:.3f}", end="\n\n")
    return found, {"shares": by_route, "quality": quality}


def _was_trained_on(artifact: RouterArtifact, labelled: LabelledSet) -> bool:
    return any(one.get("sha256") == labelled.fingerprint for one in artifact.training.get("data", []))
