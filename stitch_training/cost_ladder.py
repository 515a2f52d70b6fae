"""Quality against cost: systems between two models, beside the straight line between these. Measures nothing.

A system that lies under the line is worth more than mixing answers of the two models alone in the share that costs
the same: line(p) = l_top + (p - p_top) (l_bottom - l_top) / (p_bottom - p_top).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stitch_server.model.description import ParameterCount
from stitch_training.pairs import LoadedPair
from stitch_training.scoring import Interval
from stitch_training.sums import Cut

BOTTOM, TOP = "bottom alone", "top alone"


@dataclass(frozen=True)
class Rung:
    """One system: what one token costs and what it gives."""

    name: str
    # Parameters read for one token, head and stitch included.
    parameters: int
    # Held-out cross-entropy in nats a token: `all`, and by file.
    losses: dict[str, Interval]
    # Share of tokens at which its likeliest next token is the bottom model's; not measured by a sweep.
    agreement: Interval | None = None
    # Share of questions answered as their gold answer says, where any were asked.
    exact_match: Interval | None = None


def parameters_of(loaded: LoadedPair, cut: Cut, has_stitch: bool = True, adapter_rank: int = 0) -> int:
    """Parameters that a stitched pair reads for one token."""
    counts, widths = (loaded.bottom_count, loaded.top_count), (loaded.bottom.hidden_size, loaded.top.hidden_size)
    return stitched_parameters(counts, widths if has_stitch else None, cut, adapter_rank)


def stitched_parameters(
    counts: tuple[ParameterCount, ParameterCount], widths: tuple[int, int] | None, cut: Cut, adapter_rank: int = 0
) -> int:
    """The same from the `counts` and hidden sizes of bottom and top; without `widths` nothing lies between them."""
    (bottom, top), (k, j) = counts, cut
    left = len(top.layers) - j
    between = widths[1] * (widths[0] + 1 + 2 * adapter_rank * left) if widths else 0
    return bottom.between(0, k) + between + top.between(j, len(top.layers)) + top.head


def whole_parameters(loaded: LoadedPair) -> dict[str, int]:
    """Of both models alone."""
    counts = {BOTTOM: loaded.bottom_count, TOP: loaded.top_count}
    return {name: count.between(0, len(count.layers)) + count.head for name, count in counts.items()}


@dataclass(frozen=True)
class Ladder:
    """Both models alone and everything between them."""

    bottom: Rung
    top: Rung
    rungs: tuple[Rung, ...]

    def line_at(self, parameters: int, file: str = "all") -> float:
        """The loss on the straight line between both models; the bottom's where they are one."""
        span = self.bottom.parameters - self.top.parameters
        start, end = self.top.losses[file].mean, self.bottom.losses[file].mean
        return end if span == 0 else start + (parameters - self.top.parameters) * (end - start) / span

    def rows(self) -> list[dict[str, Any]]:
        """One object a system, cheapest first."""
        systems = sorted((self.bottom, self.top, *self.rungs), key=lambda rung: rung.parameters)
        return [{**asdict(rung), "line": self.line_at(rung.parameters), "gain": self.gain(rung)} for rung in systems]

    def gain(self, rung: Rung) -> float:
        """How far a rung lies under the line, in nats; negative over it."""
        return self.line_at(rung.parameters) - rung.losses["all"].mean

    def lines(self) -> list[str]:
        """The rows as a table for people."""
        files = list(self.bottom.losses)
        shares = f"{'agreement':>18s} {'exact match':>18s}"
        lines = [f"{'system':16s} {'parameters':>12s} {'under line':>11s} {shares}  " + "  ".join(files)]
        for row in self.rows():
            means = "  ".join(f"{row['losses'][file]['mean']:{max(5, len(file))}.3f}" for file in files)
            shares = f"{_shown(row['agreement']):>18s} {_shown(row['exact_match']):>18s}"
            lines.append(f"{row['name']:16s} {row['parameters']:12,d} {row['gain']:11.3f} {shares}  {means}")
        return lines

    def plot(self, path: Path) -> None:
        """Loss against parameters read per token, with 95 % intervals and the line."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        ends = [self.top, self.bottom]
        axes.plot([end.parameters / 1e6 for end in ends], [end.losses["all"].mean for end in ends], "k--o", lw=1)
        for rung in (*ends, *self.rungs):
            loss, place = rung.losses["all"], rung.parameters / 1e6
            spread = [[loss.mean - loss.low], [loss.high - loss.mean]]
            axes.errorbar(place, loss.mean, spread, fmt="none" if rung in ends else "o", capsize=3, color="C0")
            axes.annotate(
                rung.name, (place, loss.high), xytext=(-3, 6), textcoords="offset points", rotation=90, fontsize=8
            )
        # Room for the names above the intervals.
        axes.margins(y=0.2)
        axes.set_xlabel("parameters read per token, millions")
        axes.set_ylabel("held-out cross-entropy, nats per token")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _shown(share: dict[str, float] | None) -> str:
    return f"{share['mean']:.3f} [{share['low']:.2f}, {share['high']:.2f}]" if share else "-"
