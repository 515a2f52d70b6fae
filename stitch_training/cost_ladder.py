"""Held-out loss against parameters read per token: stitched models beside the line between both whole models.

A stitched model under the line is better than mixing the answers of the two whole models in the share that costs the
same: line(p) = l_top + (p - p_top) (l_bottom - l_top) / (p_bottom - p_top).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stitch_server.model.description import ParameterCount
from stitch_training.least_squares import CutPoint
from stitch_training.models import LoadedPair
from stitch_training.scoring import Interval

BOTTOM, TOP = "bottom alone", "top alone"


@dataclass(frozen=True)
class Rung:
    """One model, whole or stitched: its cost per token and its quality."""

    name: str
    # Parameters read per token, head and stitch included.
    parameters: int
    # Held-out cross-entropy in nats per token: `all`, and by file.
    losses: dict[str, Interval]
    # Share of tokens whose greedy next token is the bottom model's; None: not measured.
    agreement: Interval | None = None
    # Share of questions whose greedy answer matches the gold answer; None: not measured.
    exact_match: Interval | None = None


def parameters_of(loaded: LoadedPair, cut: CutPoint, has_stitch: bool = True, adapter_rank: int = 0) -> int:
    """Returns the parameters that a stitched pair reads per token."""
    counts, widths = (loaded.bottom_count, loaded.top_count), (loaded.bottom.hidden_size, loaded.top.hidden_size)
    return stitched_parameters(counts, widths if has_stitch else None, cut, adapter_rank)


def stitched_parameters(
    counts: tuple[ParameterCount, ParameterCount], widths: tuple[int, int] | None, cut: CutPoint, adapter_rank: int = 0
) -> int:
    """Returns the same from the `counts` and hidden sizes of bottom and top; `widths` None: there is no stitch."""
    (bottom, top), (k, j) = counts, cut
    top_layers = len(top.layers) - j
    stitch = widths[1] * (widths[0] + 1 + 2 * adapter_rank * top_layers) if widths else 0
    return bottom.between(0, k) + stitch + top.between(j, len(top.layers)) + top.head


def whole_parameters(loaded: LoadedPair) -> dict[str, int]:
    """Returns the parameters that each whole model reads per token."""
    counts = {BOTTOM: loaded.bottom_count, TOP: loaded.top_count}
    return {name: count.between(0, len(count.layers)) + count.head for name, count in counts.items()}


@dataclass(frozen=True)
class Ladder:
    """Both whole models and the stitched ones between them."""

    bottom: Rung
    top: Rung
    rungs: tuple[Rung, ...]

    def line_at(self, parameters: int, file: str = "all") -> float:
        """Returns the loss on the line between both models; the bottom's where they are one model."""
        span = self.bottom.parameters - self.top.parameters
        start, end = self.top.losses[file].mean, self.bottom.losses[file].mean
        return end if span == 0 else start + (parameters - self.top.parameters) * (end - start) / span

    def rows(self) -> list[dict[str, Any]]:
        """Returns one JSON object per model, cheapest first."""
        ordered = sorted((self.bottom, self.top, *self.rungs), key=lambda rung: rung.parameters)
        return [{**asdict(rung), "line": self.line_at(rung.parameters), "gain": self.gain(rung)} for rung in ordered]

    def gain(self, rung: Rung) -> float:
        """Returns how far a rung is under the line, in nats; negative above it."""
        return self.line_at(rung.parameters) - rung.losses["all"].mean

    def lines(self) -> list[str]:
        """Returns the rows as a printed table."""
        files = list(self.bottom.losses)
        shares = f"{'agreement':>18s} {'exact match':>18s}"
        lines = [f"{'system':16s} {'parameters':>12s} {'under line':>11s} {shares}  " + "  ".join(files)]
        for row in self.rows():
            means = "  ".join(f"{row['losses'][file]['mean']:{max(5, len(file))}.3f}" for file in files)
            shares = f"{_format_share(row['agreement']):>18s} {_format_share(row['exact_match']):>18s}"
            lines.append(f"{row['name']:16s} {row['parameters']:12,d} {row['gain']:11.3f} {shares}  {means}")
        return lines

    def plot(self, path: Path) -> None:
        """Draws loss against parameters read per token, with 95 % intervals and the line."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        ends = [self.top, self.bottom]
        axes.plot([end.parameters / 1e6 for end in ends], [end.losses["all"].mean for end in ends], "k--o", lw=1)
        for rung in (*ends, *self.rungs):
            loss, millions = rung.losses["all"], rung.parameters / 1e6
            spread = [[loss.mean - loss.low], [loss.high - loss.mean]]
            axes.errorbar(millions, loss.mean, spread, fmt="none" if rung in ends else "o", capsize=3, color="C0")
            at, offset = (millions, loss.high), (-3, 6)
            axes.annotate(rung.name, at, xytext=offset, textcoords="offset points", rotation=90, fontsize=8)
        # The names above the intervals need room.
        axes.margins(y=0.2)
        axes.set_xlabel("parameters read per token, millions")
        axes.set_ylabel("held-out cross-entropy, nats per token")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _format_share(share: dict[str, float] | None) -> str:
    return f"{share['mean']:.3f} [{share['low']:.2f}, {share['high']:.2f}]" if share else "-"
