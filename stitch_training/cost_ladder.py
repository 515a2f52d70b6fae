"""Quality against parameters read per token: both whole models, stitched ones between them, and controls.

Two systems can be mixed: a share of the queries goes to one, the rest to the other, at the mean of both costs and both
losses. So a stitched model is worth its place where it is better than every mix of the others at its cost: above the
line between both ends,

    line(p) = l_top + (p - p_top) (l_bottom - l_top) / (p_bottom - p_top),

and above the hull of all others. The ends are the whole models with adapters trained on the same tokens, where such
controls are given: a stitched model has learnt from these tokens too. All losses are over the same sequences, so the
intervals are paired ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from stitch_server.model.description import ParameterCount
from stitch_training.data import CONTENT_SLICE
from stitch_training.intervals import Interval, Sample, difference, interval_of
from stitch_training.least_squares import CutPoint
from stitch_training.models import LoadedPair

BOTTOM, TOP = "bottom alone", "top alone"
# `adapted`: a whole model with adapters. No alternatives to a route: `control`, which is another control, and
# `quantized`, any system by weights of fewer bits, which costs fewer bytes for as many parameters.
Kind: TypeAlias = Literal["end", "route", "adapted", "control", "quantized"]
ALTERNATIVES: tuple[Kind, ...] = ("end", "route", "adapted")


@dataclass(frozen=True, eq=False)
class Rung:
    """One system: its cost per token and its quality."""

    name: str
    # Parameters read per token, head, stitch and adapters included.
    parameters: int
    # Cross-entropy in nats per token, by slice (`scoring.Slices`).
    losses: dict[str, Sample]
    # Share of tokens whose greedy next token is the bottom model's, by slice.
    agreement: dict[str, Sample] = field(default_factory=dict)
    # Other figures by name, such as those of answers.
    figures: dict[str, Sample] = field(default_factory=dict)
    kind: Kind = "route"

    @property
    def loss(self) -> Sample:
        """The loss on all content."""
        return self.losses[CONTENT_SLICE]

    def quantities(self) -> dict[str, Sample]:
        """Returns all by which systems are compared with each other."""
        agreement = {"text agreement": self.agreement[CONTENT_SLICE]} if self.agreement else {}
        return {"loss": self.loss, **agreement, **self.figures}


def parameters_of(loaded: LoadedPair, cut: CutPoint, adapter_rank: int = 0) -> int:
    """Returns the parameters that a stitched pair reads per token."""
    bottom, top = loaded.bottom_count, loaded.top_count
    top_layers = len(top.layers) - cut.j
    stitch = loaded.top.hidden_size * (loaded.bottom.hidden_size + 1 + 2 * adapter_rank * top_layers)
    return bottom.between(0, cut.k) + stitch + top.between(cut.j, len(top.layers)) + top.head


def whole_parameters(count: ParameterCount) -> int:
    """Returns the parameters that a whole model reads per token."""
    return count.between(0, len(count.layers)) + count.head


@dataclass(frozen=True, eq=False)
class Ladder:
    """Both whole models (one object twice where a model is cut against itself), routes between them, and controls."""

    bottom: Rung
    top: Rung
    rungs: tuple[Rung, ...]

    def systems(self) -> list[Rung]:
        """Returns all, cheapest first."""
        ends = (self.bottom,) if self.top is self.bottom else (self.bottom, self.top)
        return sorted((*ends, *self.rungs), key=lambda rung: rung.parameters)

    def ends(self) -> tuple[Rung, Rung]:
        """Returns the bottom and the top between which the line is drawn: the adapted ones where both were measured."""
        adapted = {rung.name: rung for rung in self.rungs if rung.kind == "adapted"}
        bottom = adapted.get(adapted_name(BOTTOM))
        top = bottom if self.top is self.bottom else adapted.get(adapted_name(TOP))
        return (self.bottom, self.top) if bottom is None or top is None else (bottom, top)

    def over_line(self, rung: Rung) -> Interval | None:
        """Returns how far a rung is above the line between the ends, in nats; None where both are one model."""
        bottom, top = self.ends()
        return None if bottom.parameters == top.parameters else _over_mix(rung, top, bottom)

    def over_mix(self, rung: Rung) -> tuple[Rung, Rung, Interval] | None:
        """Returns how far a rung is above the best mix of two others at its cost, in nats, and which two these are.

        None where none of the others is cheaper, or none costlier.
        """
        others = [one for one in self.systems() if one is not rung and one.kind in ALTERNATIVES]
        pairs = [
            (cheaper, costlier)
            for cheaper in others
            for costlier in others
            if cheaper.parameters < costlier.parameters and cheaper.parameters <= rung.parameters <= costlier.parameters
        ]
        if not pairs:
            return None
        best = min(pairs, key=lambda pair: _mixed(rung, pair[0], pair[1], {one.name: one.loss.mean() for one in pair}))
        return *best, _over_mix(rung, *best)

    def gap_closed(self, rung: Rung) -> Interval | None:
        """Returns which share of the loss between both ends a rung closes; None where both are one model."""
        bottom, top = self.ends()
        if bottom is top:
            return None
        samples = {"bottom": bottom.loss, "top": top.loss, "rung": rung.loss}
        return interval_of(lambda loss: (loss["top"] - loss["rung"]) / (loss["top"] - loss["bottom"]), samples)

    def as_json(self) -> dict[str, Any]:
        """Returns every system's figures, and the paired differences of every two."""
        return {"systems": [self._row(rung) for rung in self.systems()], "differences": self._differences()}

    def _row(self, rung: Rung) -> dict[str, Any]:
        mix = self.over_mix(rung)
        return {
            "name": rung.name,
            "kind": rung.kind,
            "parameters": rung.parameters,
            "losses": _intervals(rung.losses),
            "agreement": _intervals(rung.agreement),
            "figures": _intervals(rung.figures),
            "over_line": _optional(self.over_line(rung)),
            "over_mix": None if mix is None else {"of": [mix[0].name, mix[1].name], **asdict(mix[2])},
            "gap_closed": _optional(self.gap_closed(rung)),
        }

    def _differences(self) -> dict[str, Any]:
        """Returns by quantity, system and other system the mean of the first minus that of the second."""
        systems = self.systems()
        found: dict[str, Any] = {}
        for name in self.bottom.quantities():
            measured = {one.name: one.quantities()[name] for one in systems if name in one.quantities()}
            found[name] = {
                one: {other: asdict(difference(measured[one], measured[other])) for other in measured if other != one}
                for one in measured
            }
        return found

    def markdown(self) -> str:
        """Returns the figures as tables: losses, the line and the hull, other figures, differences from the ends."""
        systems = self.systems()
        parts = list(dict.fromkeys(part for one in systems for part in one.losses))
        losses = [[one.name, f"{one.parameters:,}", *(_cell(one.losses, part) for part in parts)] for one in systems]
        tables = ["Loss in nats per token", _table(["system", "parameters", *parts], losses)]
        places = [[one.name, *self._place(one)] for one in systems if one.kind == "route"]
        if places:
            heading = ["route", "above the line of the ends", "above the mix of", "by", "is above", "gap closed"]
            tables += ["Beside mixes of the others, in nats", _table(heading, places)]
        figures = list(dict.fromkeys(name for one in systems for name in one.quantities() if name != "loss"))
        if figures:
            rows = [[one.name, *(_cell(one.quantities(), name) for name in figures)] for one in systems]
            tables += ["Shares and times", _table(["system", *figures], rows)]
        columns = [one for one in systems if one.kind != "quantized"]
        rows = [[one.name, *(_difference_cell(one, other) for other in columns)] for one in systems]
        tables += ["Loss of a row minus that of a column", _table(["", *(one.name for one in columns)], rows)]
        return "\n\n".join(tables) + "\n"

    def _place(self, rung: Rung) -> list[str]:
        line, mix, gap = self.over_line(rung), self.over_mix(rung), self.gap_closed(rung)
        cells = ["-" if line is None else str(line)]
        if mix is None:
            cells += ["-", "-", "-"]
        else:
            cheaper, costlier, gain = mix
            is_above = "yes" if gain.low > 0 else "no" if gain.high < 0 else "can't be told"
            cells += [f"{cheaper.name}, {costlier.name}", str(gain), is_above]
        return [*cells, "-" if gap is None else str(gap)]

    def plot(self, path: Path) -> None:
        """Draws loss on content against parameters read per token, with 95 % intervals, the line and the hull."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        bottom, top = self.ends()
        axes.plot([end.parameters / 1e6 for end in (top, bottom)], [end.loss.mean() for end in (top, bottom)], "k--o")
        corners = hull((one.parameters, one.loss.mean()) for one in self.systems() if one.kind in ALTERNATIVES)
        axes.plot([cost / 1e6 for cost, _ in corners], [loss for _, loss in corners], color="0.7", zorder=0)
        for rung in (one for one in self.systems() if one.kind != "quantized"):
            loss, millions = rung.loss.interval(), rung.parameters / 1e6
            spread = [[max(0.0, loss.mean - loss.low)], [max(0.0, loss.high - loss.mean)]]
            axes.errorbar(millions, loss.mean, spread, fmt="o" if rung.kind == "route" else "s", capsize=3, color="C0")
            at, offset = (millions, loss.high), (-3, 6)
            axes.annotate(rung.name, at, xytext=offset, textcoords="offset points", rotation=90, fontsize=8)
        # The names above the intervals need room.
        axes.margins(y=0.2)
        axes.set_xlabel("parameters read per token, millions")
        axes.set_ylabel("held-out cross-entropy on content, nats per token")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def adapted_name(end: str) -> str:
    """Returns the name of a whole model with adapters."""
    return f"{end}, adapted"


def hull(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns the corners of the lowest losses that mixes reach at every cost, cheapest first."""
    corners: list[tuple[int, float]] = []
    for cost, loss in sorted(points):
        while len(corners) > 1 and _is_above(corners[-1], corners[-2], (cost, loss)):
            corners.pop()
        corners.append((cost, loss))
    return corners


def _is_above(middle: tuple[int, float], left: tuple[int, float], right: tuple[int, float]) -> bool:
    """Whether the middle point is on or above the line from left to right."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def _mixed(rung: Rung, cheaper: Rung, costlier: Rung, losses: Mapping[str, Any]) -> Any:
    """Returns the loss of the mix of two systems at the cost of a rung."""
    share = (rung.parameters - cheaper.parameters) / (costlier.parameters - cheaper.parameters)
    return losses[cheaper.name] + share * (losses[costlier.name] - losses[cheaper.name])


def _over_mix(rung: Rung, cheaper: Rung, costlier: Rung) -> Interval:
    def gain(losses: Mapping[str, Tensor]) -> Tensor:
        mixed: Tensor = _mixed(rung, cheaper, costlier, losses)
        return mixed - losses[rung.name]

    return interval_of(gain, {one.name: one.loss for one in (rung, cheaper, costlier)})


def _intervals(samples: Mapping[str, Sample]) -> dict[str, dict[str, float]]:
    return {name: asdict(sample.interval()) for name, sample in samples.items()}


def _optional(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def _cell(samples: Mapping[str, Sample], name: str) -> str:
    return str(samples[name].interval()) if name in samples else "-"


def _difference_cell(one: Rung, other: Rung) -> str:
    return "" if one is other else str(difference(one.loss, other.loss))


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
