"""Compares many cut points by least squares, from one pass over the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stitch.cluster import ClusterConfig
from stitch_training.activations import HELD_OUT, Passes, Progress
from stitch_training.cost_ladder import BOTTOM, TOP, Ladder, Rung, parameters_of, whole_parameters
from stitch_training.data import DataSettings
from stitch_training.fit import check_cut, describe, passes_for
from stitch_training.least_squares import ClosedForm, CutPoint
from stitch_training.models import LoadedPair, load_pair
from stitch_training.scoring import by_file, mapping_of, tail_losses, whole_losses


@dataclass(frozen=True)
class SweepSettings:
    """The models, the cut points and the data of a sweep."""

    cluster: ClusterConfig
    # Empty: a grid over both models.
    cuts: tuple[CutPoint, ...]
    data: DataSettings
    dtype: str
    run_dir: Path
    # Run directories of earlier passes, whose sequences don't run through the bottom model again.
    reuse: tuple[Path, ...] = ()


def grid(loaded: LoadedPair, bottom_layers: list[int], around: int) -> tuple[CutPoint, ...]:
    """Returns for every k the depths j near equal relative depth: `around` above it and `around` + 1 below.

    Equal relative depth is seldom the best cut; the best j is usually a little smaller.
    """
    cuts = []
    for k in bottom_layers:
        equal = round(k * loaded.top.layers / loaded.bottom.layers)
        cuts += [CutPoint(k, j) for j in range(equal - around - 1, equal + around + 1) if 0 <= j < loaded.top.layers]
    return tuple(cuts)


def sweep(settings: SweepSettings, progress: Progress) -> tuple[Ladder, dict[str, object]]:
    """Returns the ladder of all cuts by least squares, and the models and data for its report.

    `fit` can reuse the run directory for any of the cuts. Raises InvalidRequest for a cut outside of the models.
    """
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype))
    cuts = settings.cuts or grid(loaded, list(range(4, loaded.bottom.layers + 1, 4)), 2)
    for cut in cuts:
        check_cut(loaded, cut)
    passes = passes_for(loaded, cuts, settings.data, settings.dtype, settings.run_dir, progress, settings.reuse)
    closed = ClosedForm(passes.training.sums, passes.held_out.sums)
    names = [path.name for path in settings.data.files]
    rungs = []
    for number, cut in enumerate(cuts, 1):
        ridge = closed.ridge_fit(cut)
        stitch = mapping_of(closed.hold_first(cut.k, ridge.map, closed.first_target(cut.j), ridge.ridge))
        losses = tail_losses(loaded.pair.top, passes.held_out, cut, stitch)
        name = f"{cut.k} → {cut.j}"
        rungs.append(Rung(name, parameters_of(loaded, cut), by_file(losses, _files(passes), names)))
        progress("solve", number, len(cuts))
    ladder = Ladder(*whole_rungs(loaded, passes, names, settings.run_dir), tuple(rungs))
    return ladder, describe(loaded, passes, settings.data, settings.dtype)


def _files(passes: Passes) -> torch.Tensor:
    return passes.held_out.trace.files(torch.arange(passes.held_out.sequences))


def whole_rungs(loaded: LoadedPair, passes: Passes, names: list[str], run_dir: Path) -> tuple[Rung, Rung]:
    """Returns the rungs of the whole bottom and the whole top model."""
    losses, parameters = whole_losses(loaded.pair, passes.held_out, run_dir / HELD_OUT), whole_parameters(loaded)
    bottom, top = (by_file(losses[name], _files(passes), names) for name in ("bottom", "top"))
    return Rung(BOTTOM, parameters[BOTTOM], bottom), Rung(TOP, parameters[TOP], top)
