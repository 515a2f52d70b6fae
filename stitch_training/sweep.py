"""Many cuts from one pass over the data: least squares for each, and what it gives. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stitch.cluster import ClusterConfig
from stitch_training.cost_ladder import BOTTOM, TOP, Ladder, Rung, parameters_of, whole_parameters
from stitch_training.fit import check_cut, described, passes_for
from stitch_training.held_out import alone_losses, tail_losses
from stitch_training.packing import DataSettings
from stitch_training.pairs import LoadedPair, load_pair
from stitch_training.run_directory import HELD_OUT, Passes, Progress
from stitch_training.scoring import applied, by_file
from stitch_training.sums import ClosedForm, Cut


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep is told."""

    cluster: ClusterConfig
    cuts: tuple[Cut, ...]
    data: DataSettings
    dtype: str
    work: Path
    # Work folders of earlier passes, whose sequences need not pass the bottom model again.
    reuse: tuple[Path, ...] = ()


def grid(loaded: LoadedPair, bottom_layers: list[int], around: int) -> tuple[Cut, ...]:
    """For every k the depths j near the one of equal relative depth, `around` on either side and often less deep.

    Equal relative depth itself is seldom the best cut; the best j is usually a little smaller.
    """
    cuts = []
    for k in bottom_layers:
        same = round(k * loaded.top.layers / loaded.bottom.layers)
        cuts += [(k, j) for j in range(same - around - 1, same + around + 1) if 0 <= j < loaded.top.layers]
    return tuple(cuts)


def sweep(settings: SweepSettings, progress: Progress) -> tuple[Ladder, dict[str, object]]:
    """The ladder of all cuts by least squares, and what there is to report of its making.

    The work folder's trace then serves `fit` for any of them. Raises InvalidRequest for a cut that is none.
    """
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype))
    cuts = settings.cuts or grid(loaded, _every_fourth(loaded.bottom.layers), 2)
    for cut in cuts:
        check_cut(loaded, cut)
    passes = passes_for(loaded, cuts, settings.data, settings.dtype, settings.work, progress, settings.reuse)
    closed = ClosedForm(passes.training.sums, passes.held_out.sums)
    names = [path.name for path in settings.data.files]
    rungs = []
    for number, cut in enumerate(cuts, 1):
        ridge = closed.ridge_fit(cut)
        stitch = applied(closed.hold_first(cut[0], ridge.map, closed.first_target(cut[1]), ridge.ridge))
        values = tail_losses(loaded.pair.top, passes.held_out, cut, stitch)
        name = f"{cut[0]} → {cut[1]}"
        rungs.append(Rung(name, parameters_of(loaded, cut), by_file(values, _files(passes), names)))
        progress("solve", number, len(cuts))
    ladder = Ladder(*both_alone(loaded, passes, names, settings.work), tuple(rungs))
    return ladder, described(loaded, passes, settings.data, settings.dtype)


def _every_fourth(layers: int) -> list[int]:
    return list(range(4, layers + 1, 4))


def _files(passes: Passes) -> torch.Tensor:
    return passes.held_out.trace.files(torch.arange(passes.held_out.sequences))


def both_alone(loaded: LoadedPair, passes: Passes, names: list[str], work: Path) -> tuple[Rung, Rung]:
    """The bottom and the top model alone on the held-out sequences."""
    found, parameters = alone_losses(loaded.pair, passes.held_out, work / HELD_OUT), whole_parameters(loaded)
    bottom, top = (by_file(found[name], _files(passes), names) for name in ("bottom", "top"))
    return Rung(BOTTOM, parameters[BOTTOM], bottom), Rung(TOP, parameters[TOP], top)
