"""Compares many cut points by least squares, from one pass over the data.

Cuts are ranked by the divergence of their distribution from the bottom model's, over the tokens that a fit of the cut
would be trained on: the loss on text rewards a cut for the text's form as well, which training teaches any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest
from stitch_training.activations import HELD_OUT, Passes, Progress
from stitch_training.cost_ladder import BOTTOM, TOP, Ladder, Rung, parameters_of, whole_parameters
from stitch_training.data import DataSettings, LossOn
from stitch_training.device import CPU
from stitch_training.fit import check_cut, describe, passes_for
from stitch_training.intervals import Sample
from stitch_training.least_squares import ClosedForm, CutPoint
from stitch_training.models import LoadedPair, load_pair
from stitch_training.scoring import Slices, counted, mapping_of, tail_scores, whole_losses

DIVERGENCE = "divergence"


@dataclass(frozen=True)
class SweepSettings:
    """The models, the cut points and the data of a sweep."""

    cluster: ClusterConfig
    # Empty: a grid over both models.
    cuts: tuple[CutPoint, ...]
    data: DataSettings
    dtype: str
    run_dir: Path
    # The next tokens whose divergence ranks the cuts.
    loss_on: LossOn = "content"
    # Share of the bottom's parameters that a cut must save at least.
    least_saving: float = 0.0
    # Run directories of earlier passes, whose sequences don't run through the bottom model again.
    reuse: tuple[Path, ...] = ()
    device: torch.device = CPU


def grid(loaded: LoadedPair, bottom_layers: list[int], around: int) -> tuple[CutPoint, ...]:
    """Returns for every k the depths j near equal relative depth: `around` above it and `around` + 1 below.

    Equal relative depth is seldom the best cut; the best j is usually a little smaller. One model alone is cut where
    that leaves out up to a half of its layers.
    """
    if loaded.is_one_model:
        layers = loaded.top.layers
        return tuple(CutPoint(k, j) for k in bottom_layers for j in range(k + 1, min(k + layers // 2 + 1, layers)))
    cuts = []
    for k in bottom_layers:
        equal = round(k * loaded.top.layers / loaded.bottom.layers)
        cuts += [CutPoint(k, j) for j in range(equal - around - 1, equal + around + 1) if 0 <= j < loaded.top.layers]
    return tuple(cuts)


@dataclass(frozen=True, eq=False)
class Sweep:
    """The cuts by least squares, both whole models, and what the report says of models and data."""

    ladder: Ladder
    description: dict[str, Any]

    def ranking(self) -> list[Rung]:
        """Returns the cuts, the least divergence first."""
        return sorted(self.ladder.rungs, key=lambda rung: rung.figures[DIVERGENCE].mean())

    def lines(self) -> list[str]:
        """Returns the ranking as lines of a table."""
        bottom = self.ladder.bottom.parameters
        lines = [f"{'cut':10s} {'saves':>6s}  {DIVERGENCE:24s} loss on content"]
        for rung in self.ranking():
            saving, divergence = 1 - rung.parameters / bottom, rung.figures[DIVERGENCE].interval()
            lines.append(f"{rung.name:10s} {saving:6.1%}  {divergence!s:24s} {rung.loss.interval()}")
        return lines


def sweep(settings: SweepSettings, progress: Progress) -> Sweep:
    """Measures all cuts that save enough.

    `fit` can reuse the run directory for any of the cuts. Raises InvalidRequest for a cut outside of the models, and
    where none saves enough.
    """
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype), settings.device)
    cuts = _saving(loaded, settings)
    passes = passes_for(loaded, cuts, settings.data, settings.dtype, settings.run_dir, progress, settings.reuse)
    closed = ClosedForm(passes.training.sums, passes.held_out.sums)
    names = [path.name for path in settings.data.files]
    slices, mask = Slices.of_pass(passes.held_out, names), _counted(passes, settings.loss_on)
    rungs = []
    for number, cut in enumerate(cuts, 1):
        ridge = closed.ridge_fit(cut)
        stitch = mapping_of(closed.hold_first(cut.k, ridge.map, closed.first_target(cut.j), ridge.ridge))
        scores = tail_scores(loaded.pair, passes.held_out, cut, stitch)
        figures = {DIVERGENCE: Sample.of_tokens(scores.divergences, mask)}
        losses = slices.samples(scores.losses)
        rungs.append(Rung(f"{cut.k} → {cut.j}", parameters_of(loaded, cut), losses, figures=figures))
        progress("solve", number, len(cuts))
    ladder = Ladder(*whole_rungs(loaded, passes, slices, settings.run_dir), tuple(rungs))
    used = {"loss_on": settings.loss_on, "least_saving": settings.least_saving}
    return Sweep(ladder, {**describe(loaded, passes, settings.data, settings.dtype), **used})


def _saving(loaded: LoadedPair, settings: SweepSettings) -> tuple[CutPoint, ...]:
    """Returns the cuts that save enough of the bottom's parameters. Raises InvalidRequest where none does."""
    cuts = settings.cuts or grid(loaded, list(range(4, loaded.bottom.layers + 1, 4)), 2)
    for cut in cuts:
        check_cut(loaded, cut)
    most = (1 - settings.least_saving) * whole_parameters(loaded.bottom_count)
    found = tuple(cut for cut in cuts if parameters_of(loaded, cut) <= most)
    if not found:
        raise InvalidRequest("least_saving", settings.least_saving, f"none of {len(cuts)} cuts saves as much")
    return found


def _counted(passes: Passes, loss_on: LossOn) -> torch.Tensor:
    """Returns which held-out tokens count. Raises InvalidRequest where there is none."""
    mask = counted(passes.held_out.trace.roles(torch.arange(passes.held_out.sequences)), loss_on)
    if not mask.any():
        raise InvalidRequest("loss_on", loss_on, "no held-out sequence has such a token")
    return mask


def whole_rungs(loaded: LoadedPair, passes: Passes, slices: Slices, run_dir: Path) -> tuple[Rung, Rung]:
    """Returns the rungs of the whole bottom and the whole top model; one twice where they are one model."""
    losses = whole_losses(loaded.pair, passes.held_out, run_dir / HELD_OUT)
    parameters = whole_parameters(loaded.bottom_count)
    bottom = Rung(BOTTOM, parameters, slices.samples(losses["bottom"]), kind="end")
    if loaded.is_one_model:
        return bottom, bottom
    return bottom, Rung(TOP, whole_parameters(loaded.top_count), slices.samples(losses["top"]), kind="end")
