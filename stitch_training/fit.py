"""Makes one stitch: passes over the data, least squares, distillation, scores. Knows no command line.

Everything that takes long is kept in a work folder, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, RouteConfig
from stitch.errors import InvalidRequest
from stitch_server.model.adapters import Adapters
from stitch_training.distill import Distillation, Training
from stitch_training.fit_start import coordinates, needed, start_of
from stitch_training.held_out import alone_losses, tail_losses
from stitch_training.least_squares import AffineMap
from stitch_training.packing import Corpus, DataSettings
from stitch_training.pairs import LoadedPair, load_pair
from stitch_training.run_directory import HELD_OUT, Passes, Progress, run_passes, taken_up
from stitch_training.scoring import BATCH_SEQUENCES, Mapping, applied, by_file, map_of
from stitch_training.sums import ClosedForm, Cut
from stitch_training.trainable_adapters import TrainableAdapters, sizes_of
from stitch_training.trainable_stitch import TrainableStitch


@dataclass(frozen=True)
class FitSettings:
    """What a fit is told."""

    cluster: ClusterConfig
    route: str
    data: DataSettings
    training: Training
    dtype: str
    work: Path
    # A stitch of this cut whose training goes on, in place of least squares.
    start: Path | None = None
    # Work folders of earlier passes, whose sequences need not pass the bottom model again.
    reuse: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Fit:
    """A finished stitch and all that is known of it."""

    map: AffineMap
    adapters: Adapters | None
    cut: Cut
    loaded: LoadedPair
    # One JSON object: settings, data, losses before and after, history.
    report: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A map, the top's adapters, and their mean cross-entropy `[sequences]` on the held-out ones."""

    map: AffineMap
    adapters: Adapters | None
    losses: Tensor


def fit(settings: FitSettings, progress: Progress) -> Fit:
    """Fits the stitch of a route.

    `progress(what, done, of)` is called along the way. Raises InvalidRequest for a route without a stitch, data that
    can't be read, or a work folder that holds something else.
    """
    began = time.monotonic()
    cut = cut_of(settings.cluster.route(settings.route))
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype))
    check_cut(loaded, cut)
    cuts, will_do = needed(cut, loaded.bottom.layers, settings.training.aim)
    passes = passes_for(loaded, cuts, settings.data, settings.dtype, settings.work, progress, settings.reuse, will_do)
    closed = ClosedForm(passes.training.sums, passes.held_out.sums)
    start = start_of(loaded.pair, cut, passes, closed, settings.training.aim)
    given, began_as = None, "least squares"
    if settings.start is not None:
        given, began_as = loaded.stitch(settings.start, cut), "start"
        start = replace(start, map=map_of(given))
        settings = replace(settings, training=replace(settings.training, start=given.fingerprint))
    ridge, first_token, history = start.ridge, "held", {}
    begun = final = measured(loaded, cut, passes, start.map, None if given is None else given.adapters)
    if settings.training.epochs:
        at = coordinates(cut[0], start, closed)
        beside = _adapters(loaded, cut, passes, applied(start.map), settings.training, begun.adapters)
        run = _distilled(loaded, cut, passes, TrainableStitch(at, beside), settings, progress)
        free, adapters = run.stitch.to_map(), run.stitch.trained_adapters()
        held = closed.hold_first(cut[0], free, start.first, ridge.ridge)
        # Where first tokens differ too much for one mean to stand for them, as behind few layers, the hold costs the
        # others more than it gives.
        kinds = {"held": held, "free": free, "set": replace(free, first=start.first)}
        tried = {name: measured(loaded, cut, passes, one, adapters) for name, one in kinds.items()}
        first_token, final = min(tried.items(), key=lambda one: float(one[1].losses.mean()))
        history = asdict(run.history)
    report = {
        **described(loaded, passes, settings.data, settings.dtype),
        "reused": [folder.name for folder in settings.reuse],
        "route": settings.route,
        "cut": {"bottom_layers": cut[0], "top_from": cut[1]},
        "ridge": {"chosen": ridge.ridge, "held_out_explained": {f"{r:g}": v for r, v in ridge.explained.items()}},
        "training": asdict(settings.training),
        "first_token": first_token,
        "losses": scores(loaded, cut, passes, settings, {began_as: begun.losses, "stitched": final.losses}),
        "history": history,
        "seconds": time.monotonic() - began,
    }
    return Fit(final.map, final.adapters, cut, loaded, report)


def cut_of(route: RouteConfig) -> Cut:
    """The route's cut. Raises InvalidRequest where the cluster file gives it no stitch."""
    if route.stitch is None:
        raise InvalidRequest("route", route.name, "the cluster file gives it no stitch, so there is none to fit")
    return route.bottom_layers, route.top_from


def check_cut(loaded: LoadedPair, cut: Cut) -> None:
    """Raises InvalidRequest where the models don't have these layers."""
    for field, value, layers, last in (
        ("bottom_layers", cut[0], loaded.bottom.layers, loaded.bottom.layers),
        ("top_from", cut[1], loaded.top.layers, loaded.top.layers - 1),
    ):
        if not 0 <= value <= last:
            raise InvalidRequest(field, value, f"it must be 0 to {last}, the model has {layers} layers")


def passes_for(
    loaded: LoadedPair,
    cuts: tuple[Cut, ...],
    data: DataSettings,
    dtype: str,
    work: Path,
    progress: Progress,
    reuse: tuple[Path, ...] = (),
    will_do: Callable[[tuple[Cut, ...]], bool] | None = None,
) -> Passes:
    """Both passes over the data for these cuts, new or taken up again, if those of an earlier one `will_do`."""
    corpus = Corpus(data.files, loaded.encoder, data.sequence_tokens, seed=data.seed, shares=data.shares)
    models = (loaded.bottom.revision, loaded.top.revision)
    cuts = taken_up(cuts, work, will_do or (lambda found: set(cuts) <= set(found)))
    return run_passes(loaded.pair, cuts, corpus, data, data.described(models, dtype), work, progress, reuse)


def _distilled(
    loaded: LoadedPair,
    cut: Cut,
    passes: Passes,
    stitch: TrainableStitch,
    settings: FitSettings,
    progress: Progress,
) -> Distillation:
    training = passes.training
    known = replace(settings.training, data=training.fingerprint)
    checkpoint = settings.work / f"distil-{cut[0]}-{cut[1]}.safetensors"
    run = Distillation(loaded.pair, cut, training.trace, training.sequences, stitch, known, checkpoint)
    run.run(held_out_loss(loaded, cut, passes), lambda step, steps, loss: progress("distil", step, steps))
    return run


def held_out_loss(loaded: LoadedPair, cut: Cut, passes: Passes) -> Callable[[TrainableStitch], float]:
    """Mean cross-entropy of a stitch in training over the held-out trace."""
    top, held = loaded.pair.top, passes.held_out
    return lambda stitch: float(tail_losses(top, held, cut, stitch, stitch.trained_adapters()).mean())


def measured(
    loaded: LoadedPair, cut: Cut, passes: Passes, stitch: AffineMap, adapters: Adapters | None = None
) -> Measured:
    """A map with what it and the adapters lose on held-out text."""
    lost = tail_losses(loaded.pair.top, passes.held_out, cut, applied(stitch), adapters)
    return Measured(stitch, adapters, lost)


def _adapters(
    loaded: LoadedPair, cut: Cut, passes: Passes, start: Mapping, training: Training, given: Adapters | None
) -> TrainableAdapters | None:
    """Those `given`, or fresh ones beside the top's layers, measured by the first sequences; None where none are due.

    Raises InvalidRequest where those given are of another rank.
    """
    if given is not None and given.rank != training.adapter_rank:
        raise InvalidRequest("adapter_rank", training.adapter_rank, f"it must be {given.rank}, as in the start")
    if not training.adapter_rank:
        return None
    trace, (k, j) = passes.training.trace, cut
    first = torch.arange(min(BATCH_SEQUENCES, passes.training.sequences))
    sizes = sizes_of(loaded.pair.top, start(trace.hidden(k, first)), j)
    if given is not None:
        return TrainableAdapters(sizes, given)
    return TrainableAdapters.fresh(j, training.adapter_rank, sizes, training.seed)


def scores(
    loaded: LoadedPair, cut: Cut, passes: Passes, settings: FitSettings, stitched: dict[str, Tensor]
) -> dict[str, Any]:
    """Held-out cross-entropy of both models alone, of layers left out where one model is cut, and of every stitch."""
    held, top = passes.held_out, loaded.pair.top
    found = alone_losses(loaded.pair, held, settings.work / HELD_OUT)
    if loaded.is_one_model:
        found = {"bottom": found["bottom"], "layers left out": tail_losses(top, held, cut, lambda states: states)}
    found |= stitched
    files, names = held.trace.files(torch.arange(held.sequences)), [path.name for path in settings.data.files]
    return {name: {file: asdict(i) for file, i in by_file(v, files, names).items()} for name, v in found.items()}


def described(loaded: LoadedPair, passes: Passes, data: DataSettings, dtype: str) -> dict[str, Any]:
    """What every report says of models and data."""
    return {
        "bottom": {"id": loaded.bottom.id, "revision": loaded.bottom.revision},
        "top": {"id": loaded.top.id, "revision": loaded.top.revision},
        "dtype": dtype,
        "files": [path.name for path in data.files],
        "data": passes.training.fingerprint,
        "tokens": passes.training.sequences * data.sequence_tokens,
        "sequence_tokens": data.sequence_tokens,
        "held_out_tokens": passes.held_out.sequences * data.sequence_tokens,
        "seed": data.seed,
        "shares": data.shares,
    }
