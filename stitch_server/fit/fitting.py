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

from stitch.cluster import Cluster, RouteCut
from stitch.errors import InvalidRequest
from stitch_server.fit.distil import Distillation, Training
from stitch_server.fit.frozen import next_token_losses
from stitch_server.fit.leastsquares import AffineMap, RidgeFit
from stitch_server.fit.packing import Corpus, DataSettings
from stitch_server.fit.pairs import LoadedPair, load_pair
from stitch_server.fit.scoring import BATCH_SEQUENCES, alone, by_file, left_out, losses, stitched
from stitch_server.fit.sums import ClosedForm, Cut
from stitch_server.fit.trainable import Coordinates, TrainableStitch
from stitch_server.fit.workplace import Passes, Progress, run_passes

# Damping of the coordinates that training moves in, unless the ridge asks for more: directions with less than this
# share of the mean variance are not blown up to unit variance, or they would only carry noise.
WHITENING_RIDGE = 1e-3


@dataclass(frozen=True)
class FitSettings:
    """What a fit is told."""

    cluster: Cluster
    route: str
    data: DataSettings
    training: Training
    dtype: str
    work: Path


@dataclass(frozen=True)
class Fit:
    """A finished stitch and all that is known of it."""

    map: AffineMap
    cut: Cut
    loaded: LoadedPair
    # One JSON object: settings, data, losses before and after, history.
    report: dict[str, Any]


def fit(settings: FitSettings, progress: Progress) -> Fit:
    """Fits the stitch of a route.

    `progress(what, done, of)` is called along the way. Raises InvalidRequest for a route without a stitch, data that
    can't be read, or a work folder that holds something else.
    """
    began = time.monotonic()
    cut = cut_of(settings.cluster.route(settings.route))
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype))
    check_cut(loaded, cut)
    passes = passes_for(loaded, (cut,), settings.data, settings.dtype, settings.work, progress)
    closed = ClosedForm(passes.training.sums, passes.held_out.sums)
    ridge = closed.ridge_fit(cut)
    start = closed.hold_first(cut, ridge.map, ridge.ridge)
    final, history = start, {}
    if settings.training.epochs:
        run = _distilled(loaded, cut, passes, closed, ridge, settings, progress)
        final = closed.hold_first(cut, run.stitch.to_map(), ridge.ridge)
        history = asdict(run.history)
    report = {
        **described(loaded, passes, settings.data, settings.dtype),
        "route": settings.route,
        "cut": {"bottom_layers": cut[0], "top_from": cut[1]},
        "ridge": {"chosen": ridge.ridge, "held_out_residual": {f"{r:g}": v for r, v in ridge.residuals.items()}},
        "training": asdict(settings.training),
        "losses": scores(loaded, cut, passes, settings.data, {"least squares": start, "stitched": final}),
        "history": history,
        "seconds": time.monotonic() - began,
    }
    return Fit(final, cut, loaded, report)


def cut_of(route: RouteCut) -> Cut:
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
    loaded: LoadedPair, cuts: tuple[Cut, ...], data: DataSettings, dtype: str, work: Path, progress: Progress
) -> Passes:
    """Both passes over the data for these cuts, new or taken up again."""
    corpus = Corpus(data.files, loaded.encoder, data.sequence_tokens, seed=data.seed)
    models = (loaded.bottom.revision, loaded.top.revision)
    return run_passes(loaded.pair, cuts, corpus, data, data.described(models, dtype), work, progress)


def _distilled(
    loaded: LoadedPair,
    cut: Cut,
    passes: Passes,
    closed: ClosedForm,
    ridge: RidgeFit,
    settings: FitSettings,
    progress: Progress,
) -> Distillation:
    stitch = TrainableStitch(coordinates(cut, passes, closed, ridge))
    training = passes.training
    known = replace(settings.training, data=training.fingerprint)
    checkpoint = settings.work / f"distil-{cut[0]}-{cut[1]}.safetensors"
    run = Distillation(loaded.pair, cut, training.trace, training.sequences, stitch, known, checkpoint)
    run.run(held_out_loss(loaded, cut, passes), lambda step, steps, loss: progress("distil", step, steps))
    return run


def coordinates(cut: Cut, passes: Passes, closed: ClosedForm, ridge: RidgeFit) -> Coordinates:
    """Where training of a cut starts, from the sums alone."""
    sums, (k, j) = passes.training.sums, cut
    spread = closed.spread(k)
    # Of what least squares predicts: nearly that of the targets, and known per channel without another sum.
    variances = (ridge.map.weight @ spread.vectors).square() @ spread.values
    return Coordinates(
        weight=ridge.map.weight.float(),
        bias=ridge.map.bias.float(),
        mean=spread.mean.float(),
        whitening=spread.whitening(max(WHITENING_RIDGE, ridge.ridge)).float(),
        deviations=variances.sqrt().float(),
        first=sums.first_top[j].mean().float(),
    )


def held_out_loss(loaded: LoadedPair, cut: Cut, passes: Passes) -> Callable[[TrainableStitch], float]:
    """Mean cross-entropy of a stitch in training over the held-out trace."""
    trace, rows, (k, j) = passes.held_out.trace, torch.arange(passes.held_out.sequences), cut
    top = loaded.pair.top

    def loss(stitch: TrainableStitch) -> float:
        total = 0.0
        with torch.no_grad():
            for part in torch.split(rows, BATCH_SEQUENCES):
                hidden = top.run(stitch(trace.hidden(k, part).float()), j, top.depth)
                total += float(next_token_losses(top, hidden, trace.tokens(part)).mean(1).sum())
        return total / len(rows)

    return loss


def scores(
    loaded: LoadedPair, cut: Cut, passes: Passes, data: DataSettings, maps: dict[str, AffineMap]
) -> dict[str, Any]:
    """Held-out cross-entropy of both models alone, of layers left out where one model is cut, and of every map."""
    pair, held = loaded.pair, passes.held_out
    rows = torch.arange(held.sequences)
    tokens, files = held.trace.tokens(rows), held.trace.files(rows)
    systems = {"bottom": (pair.bottom, alone(pair.bottom)), "top": (pair.top, alone(pair.top))}
    if loaded.is_one_model:
        systems = {"bottom": systems["bottom"], "layers left out": (pair.top, left_out(pair.top, cut))}
    systems |= {name: (pair.top, stitched(pair, cut, stitch)) for name, stitch in maps.items()}
    names = [path.name for path in data.files]
    found = {name: losses(head, system, tokens) for name, (head, system) in systems.items()}
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
    }
