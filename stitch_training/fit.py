"""Makes the stitch of one route, or a control: passes over the data, a closed form, distillation, held-out losses.

Everything that takes long is kept in a run directory, so an interrupted fit resumes where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, Role, RouteConfig
from stitch.errors import InvalidRequest
from stitch_server.model.adapters import Adapters
from stitch_server.model.stitch import Stitch, StitchBinding
from stitch_training.activations import HELD_OUT, Passes, PassResult, Progress, choose_cuts, run_passes
from stitch_training.data import CONTENT_SLICE, Corpus, DataSettings
from stitch_training.device import CPU, CPU_BATCH_SEQUENCES
from stitch_training.distill import (
    AdaptedModel,
    Aim,
    Coordinates,
    Distillation,
    Student,
    TrainableAdapters,
    TrainableStitch,
    TrainingSettings,
    channel_scales,
)
from stitch_training.least_squares import AffineMap, ClosedForm, CutPoint, RidgeFit, identity_map, is_identity
from stitch_training.models import FrozenModel, LoadedPair, Pair, load_pair
from stitch_training.readout import readout
from stitch_training.report import loss_lines, plot_losses, write_json
from stitch_training.scoring import (
    Mapping,
    Slices,
    TailScores,
    counted,
    map_of,
    mapping_of,
    tail_scores,
    whole_losses,
)

# Damping of the coordinates that training moves in, unless the ridge is stronger: without it, directions with less
# than this share of the mean variance would be scaled to unit variance and carry only noise.
WHITENING_RIDGE = 1e-3
# What follows training in a fit with a time limit: evaluations of the held-out sequences, the slowest with the bottom.
FINAL_EVALUATIONS = 8
# In reports, a model that nothing is left out of or added to.
WHOLE_MODEL = "whole model"


@dataclass(frozen=True)
class Control:
    """A whole model that learns from the same tokens as a route does, and skips nothing."""

    role: Role
    # Number of layers before a map, and before the first of its adapters; None: adapters beside all layers, and no map.
    layers: int | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether it has adapters alone."""
        return self.layers is None

    @property
    def cut(self) -> CutPoint:
        """Where its map is."""
        return CutPoint(self.layers or 0, self.layers or 0)

    def __str__(self) -> str:
        return self.role if self.layers is None else f"{self.role}:{self.layers}"


@dataclass(frozen=True)
class FitSettings:
    """The route or control, the data and the training of a fit."""

    cluster: ClusterConfig
    # A route's name.
    subject: str | Control
    data: DataSettings
    training: TrainingSettings
    dtype: str
    run_dir: Path
    # A stitch of the same cut to start from, instead of the closed form.
    start: Path | None = None
    # Run directories of earlier passes, whose sequences don't run through the bottom model again.
    reuse: tuple[Path, ...] = ()
    device: torch.device = CPU


@dataclass(frozen=True)
class Fit:
    """A finished stitch with its report."""

    map: AffineMap
    adapters: Adapters | None
    cut: CutPoint
    loaded: LoadedPair
    # One JSON object: settings, data, losses before and after, history.
    report: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A map and the top's adapters with their scores on the held-out sequences."""

    map: AffineMap
    adapters: Adapters | None
    scores: TailScores
    # What training minimizes, over the tokens that it counts.
    objective: float


@dataclass(frozen=True)
class HeldOutText:
    """The held-out pass of a fit, on which every stitch of the cut is measured."""

    pair: Pair
    cut: CutPoint
    recorded: PassResult
    training: TrainingSettings

    def measure(self, stitch: AffineMap, adapters: Adapters | None = None) -> Measured:
        """Measures a map and adapters. Raises InvalidRequest where no held-out token counts in training."""
        scores = tail_scores(self.pair, self.recorded, self.cut, mapping_of(stitch), adapters)
        return Measured(stitch, adapters, scores, self._objective(scores))

    def loss(self, student: Student) -> float:
        """Returns what training minimizes, of a student in training."""
        return self._objective(tail_scores(self.pair, self.recorded, self.cut, student, student.trained_adapters()))

    def _objective(self, scores: TailScores) -> float:
        loss_on = self.training.loss_on
        mask = counted(self.recorded.trace.roles(torch.arange(self.recorded.sequences)), loss_on)
        if not mask.any():
            raise InvalidRequest("loss_on", loss_on, "no held-out sequence has such a token")
        return float(scores.objective(self.training.teacher_share)[mask].double().mean())


@dataclass(frozen=True)
class Start:
    """A closed-form map, its ridge regression, and its image of the mean state of first tokens."""

    map: AffineMap
    ridge: RidgeFit
    # [outputs]
    first: Tensor


def fit(settings: FitSettings, progress: Progress, seconds_left: Callable[[], float] = lambda: float("inf")) -> Fit:
    """Fits the stitch of a route, or a control.

    `progress(task, done, total)` is called along the way. Training ends early where `seconds_left()` is what the
    evaluations after it are expected to take; the same run directory continues it. Raises InvalidRequest for a route
    without a stitch, data that can't be read, or a run directory of another fit.
    """
    started_at = time.monotonic()
    loaded, cut = _load_subject(settings)
    check_cut(loaded, cut)
    cuts, suffices = required_cuts(cut, loaded.bottom.layers, settings.training.aim)
    passes = passes_for(
        loaded, cuts, settings.data, settings.dtype, settings.run_dir, progress, settings.reuse, suffices
    )
    closed = ClosedForm(passes.training.sums, passes.held_out.sums)
    start = start_of(loaded.pair, cut, passes, closed, settings.training.aim)
    initial_adapters, initial_name = None, "least squares"
    is_control = isinstance(settings.subject, Control)
    if is_control:
        start, initial_name = replace(start, map=identity_map(loaded.top.hidden_size, loaded.pair.device)), WHOLE_MODEL
    if settings.start is not None:
        stitch, initial_name = loaded.load_stitch(settings.start, cut), "start"
        start, initial_adapters = replace(start, map=map_of(stitch)), stitch.adapters
        settings = replace(settings, training=replace(settings.training, start=stitch.fingerprint))
    held_out = HeldOutText(loaded.pair, cut, passes.held_out, settings.training)
    measured_at = time.monotonic()
    initial = final = held_out.measure(start.map, initial_adapters)
    reserve = FINAL_EVALUATIONS * (time.monotonic() - measured_at)
    first_token, history, steps = "held", {}, {"done": 0, "planned": 0}
    if settings.training.epochs:
        run = _distillation(held_out, passes.training, start, closed, initial.adapters, settings)
        run.run(
            held_out.loss, lambda step, steps, loss: progress("distil", step, steps), lambda: seconds_left() < reserve
        )
        first_token, final = _choose_first_token(held_out, start, closed, run.student)
        history, steps = asdict(run.history), {"done": run.step, "planned": run.steps}
    stitched = {initial_name: initial.scores.losses, "stitched": final.scores.losses}
    losses = held_out_losses(loaded, cut, passes, settings, stitched)
    report = {
        **describe(loaded, passes, settings.data, settings.dtype),
        "reused": [folder.name for folder in settings.reuse],
        "control" if is_control else "route": str(settings.subject),
        "cut": {"bottom_layers": cut.k, "top_from": cut.j},
        "ridge": _describe_ridge(start.ridge),
        "training": asdict(settings.training),
        "steps": steps,
        "first_token": first_token,
        "losses": losses,
        "history": history,
        "seconds": time.monotonic() - started_at,
    }
    return Fit(final.map, final.adapters, cut, loaded, report)


def _load_subject(settings: FitSettings) -> tuple[LoadedPair, CutPoint]:
    """Returns the models and the cut point. Raises InvalidRequest where there is nothing to train."""
    subject, training, dtype = settings.subject, settings.training, getattr(torch, settings.dtype)
    if isinstance(subject, str):
        cut = cut_of(settings.cluster.route(subject))
        return load_pair(settings.cluster, dtype, settings.device), cut
    if subject.is_adapted and not training.adapter_rank:
        raise InvalidRequest("adapter_rank", 0, f"it must be at least 1: the control {subject} has adapters alone")
    if training.aim != "states":
        raise InvalidRequest("aim", training.aim, "it must be states: a control starts from the whole model")
    loaded = load_pair(settings.cluster, dtype, settings.device)
    return loaded.control(subject.role), subject.cut


def cut_of(route: RouteConfig) -> CutPoint:
    """Returns the route's cut point. Raises InvalidRequest where the cluster file gives it no stitch."""
    if route.stitch is None or route.top_from is None:
        raise InvalidRequest("route", route.name, "the cluster file gives it no stitch, so there is none to fit")
    return CutPoint(route.bottom_layers, route.top_from)


def check_cut(loaded: LoadedPair, cut: CutPoint) -> None:
    """Raises InvalidRequest where the models don't have these layers."""
    for field, value, layers, last in (
        ("bottom_layers", cut.k, loaded.bottom.layers, loaded.bottom.layers),
        ("top_from", cut.j, loaded.top.layers, loaded.top.layers - 1),
    ):
        if not 0 <= value <= last:
            raise InvalidRequest(field, value, f"it must be 0 to {last}, the model has {layers} layers")


def required_cuts(
    cut: CutPoint, depth: int, aim: Aim
) -> tuple[tuple[CutPoint, ...], Callable[[tuple[CutPoint, ...]], bool]]:
    """Returns the cut points that a pass for `cut` sums, and whether those of an earlier pass suffice.

    `depth` is the bottom's number of layers.
    """
    if aim == "states":
        return (cut,), lambda found: cut in found
    return (cut, CutPoint(depth, cut.j)), lambda found: {cut.k, depth} <= {k for k, _ in found}


def passes_for(
    loaded: LoadedPair,
    cuts: tuple[CutPoint, ...],
    data: DataSettings,
    dtype: str,
    run_dir: Path,
    progress: Progress,
    reuse: tuple[Path, ...] = (),
    suffices: Callable[[tuple[CutPoint, ...]], bool] | None = None,
) -> Passes:
    """Runs or resumes both passes over the data for these cuts, or for those of an earlier pass if they suffice."""
    corpus = Corpus(data.files, loaded.encoder, data.sequence_tokens, seed=data.seed, shares=data.shares)
    cuts = choose_cuts(cuts, run_dir, suffices or (lambda found: set(cuts) <= set(found)))
    return run_passes(loaded.pair, cuts, corpus, data, data.describe(loaded.revisions, dtype), run_dir, progress, reuse)


def start_of(pair: Pair, cut: CutPoint, passes: Passes, closed: ClosedForm, aim: Aim) -> Start:
    """Solves the closed form of a cut; with the aim `answers` both traces must have the bottom's last depth."""
    if aim == "answers":
        stitch, ridge = readout(pair, cut.k, passes, closed)
        return Start(stitch, ridge, stitch.weight @ closed.first_state(cut.k) + stitch.bias)
    ridge, first = closed.ridge_fit(cut), closed.first_target(cut.j)
    return Start(closed.hold_first(cut.k, ridge.map, first, ridge.ridge), ridge, first)


def coordinates(k: int, start: Start, closed: ClosedForm) -> Coordinates:
    """Returns the coordinates in which a stitch after `k` layers is trained, from the sums alone."""
    spread = closed.spread(k)
    # Deviations of the start's outputs: nearly those of the targets, and available without another sum.
    return Coordinates(
        weight=start.map.weight.float(),
        bias=start.map.bias.float(),
        mean=spread.mean.float(),
        whitening=spread.whitening(max(WHITENING_RIDGE, start.ridge.ridge)).float(),
        deviations=spread.variances(start.map.weight).sqrt().float(),
        first=start.first.float(),
    )


def _distillation(
    held_out: HeldOutText,
    data: PassResult,
    start: Start,
    closed: ClosedForm,
    initial: Adapters | None,
    settings: FitSettings,
) -> Distillation:
    pair, cut = held_out.pair, held_out.cut
    adapters = _adapters(pair.top, cut, data, mapping_of(start.map), settings.training, initial)
    student: Student
    if isinstance(settings.subject, Control) and settings.subject.is_adapted and adapters is not None:
        student = AdaptedModel(adapters, pair.top.hidden_size)
    else:
        student = TrainableStitch(coordinates(cut.k, start, closed), adapters)
    training = replace(settings.training, data=data.fingerprint)
    checkpoint = settings.run_dir / f"distil-{cut.k}-{cut.j}.safetensors"
    return Distillation(pair, cut, data.trace, data.sequences, student, training, checkpoint)


def _adapters(
    top: FrozenModel,
    cut: CutPoint,
    data: PassResult,
    start: Mapping,
    training: TrainingSettings,
    initial: Adapters | None,
) -> TrainableAdapters | None:
    """Returns the `initial` adapters or fresh ones, scaled by the first sequences; None at rank 0.

    Raises InvalidRequest where the initial ones have another rank.
    """
    if initial is not None and initial.rank != training.adapter_rank:
        raise InvalidRequest("adapter_rank", training.adapter_rank, f"it must be {initial.rank}, as in the start")
    if not training.adapter_rank:
        return None
    rows = torch.arange(min(CPU_BATCH_SEQUENCES, data.sequences))
    scales = channel_scales(top, start(data.trace.hidden(cut.k, rows).to(top.device)), cut.j)
    if initial is not None:
        return TrainableAdapters(scales, initial)
    return TrainableAdapters.fresh(cut.j, training.adapter_rank, scales, training.seed)


def _choose_first_token(
    held_out: HeldOutText, start: Start, closed: ClosedForm, student: Student
) -> tuple[str, Measured]:
    """Returns the treatment of first tokens with the lowest held-out loss, and the trained map with it.

    After few layers first tokens differ too much for one mean state to represent them. The hold then costs the other
    tokens more than it gives.
    """
    free, adapters = student.to_map(), student.trained_adapters()
    if is_identity(free):
        return "free", held_out.measure(free, adapters)
    held = closed.hold_first(held_out.cut.k, free, start.first, start.ridge.ridge)
    candidates = {"held": held, "free": free, "set": replace(free, first=start.first)}
    measured = {name: held_out.measure(one, adapters) for name, one in candidates.items()}
    return min(measured.items(), key=lambda one: one[1].objective)


def held_out_losses(
    loaded: LoadedPair, cut: CutPoint, passes: Passes, settings: FitSettings, stitched: dict[str, Tensor]
) -> dict[str, Any]:
    """Returns intervals by model and slice: both whole models (or one with layers left out), and every stitch."""
    held_out = passes.held_out
    losses = whole_losses(loaded.pair, held_out, settings.run_dir / HELD_OUT)
    if loaded.is_one_model:
        left_out = tail_scores(loaded.pair, held_out, cut, lambda states: states).losses
        losses = {WHOLE_MODEL: losses["bottom"], **({"layers left out": left_out} if cut.k < cut.j else {})}
    losses |= stitched
    slices = Slices.of_pass(held_out, [path.name for path in settings.data.files])
    return {
        name: {part: asdict(sample.interval()) for part, sample in slices.samples(values).items()}
        for name, values in losses.items()
    }


def _describe_ridge(ridge: RidgeFit) -> dict[str, Any]:
    return {"chosen": ridge.ridge, "held_out_explained": {f"{r:g}": value for r, value in ridge.explained.items()}}


def describe(loaded: LoadedPair, passes: Passes, data: DataSettings, dtype: str) -> dict[str, Any]:
    """Returns the fields on models and data that every report has."""
    return {
        "bottom": {"id": loaded.bottom.id, "revision": loaded.bottom.revision},
        "top": {"id": loaded.top.id, "revision": loaded.top.revision},
        "dtype": dtype,
        "device": str(loaded.pair.device),
        "files": [path.name for path in data.files],
        "data": passes.training.fingerprint,
        "tokens": passes.training.sequences * data.sequence_tokens,
        "sequence_tokens": data.sequence_tokens,
        "held_out_tokens": passes.held_out.sequences * data.sequence_tokens,
        "seed": data.seed,
        "shares": data.shares,
    }


def write_fit(fitted: Fit, out: Path, store: str) -> None:
    """Writes the stitch in dtype `store`, its report (.json) and its plot (.png); prints the table of losses."""
    loaded, dtype, stitch = fitted.loaded, getattr(torch, store), fitted.map
    binding = StitchBinding.of(loaded.bottom, loaded.top, *fitted.cut, loaded.tokenizer)
    weight, bias = stitch.weight.to(CPU, dtype), stitch.bias.to(CPU, dtype)
    first = None if stitch.first is None else stitch.first.to(CPU, dtype)
    adapters = None if fitted.adapters is None else fitted.adapters.to(CPU, dtype)
    Stitch(weight, bias, binding, provenance(fitted.report), adapters=adapters, first=first).save(out)
    write_json(out.with_suffix(".json"), fitted.report)
    plot_losses(fitted.report, out.with_suffix(".png"))
    print("\n".join(loss_lines(fitted.report)))
    print(f"written: {out}, with its report (.json) and its losses (.png)")


def provenance(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the artifact's record of its making; the same for the same fit, so without durations."""
    kept = ("data", "files", "tokens", "seed", "dtype")
    losses = {name: round(levels[CONTENT_SLICE]["mean"], 4) for name, levels in report["losses"].items()}
    method = "least squares, then distillation" if report["history"] else "least squares"
    training = report["training"] if report["history"] else {}
    control = {"control": report["control"]} if "control" in report else {}
    made = {"method": method, "training": training, "losses": losses, **control}
    return made | {name: report[name] for name in kept}
