"""All the sums of one pass over the data, for one cut or for many at once. Knows no model and no file format.

A cut (k, j) leaves the bottom model behind k layers and enters the top model before its layer j.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from stitch_training.least_squares import AffineMap, RidgeFit, Spread, fit_ridge, holding
from stitch_training.moments import Cross, FirstStates, Gram

Cut = tuple[int, int]


class Sums:
    """Grams per bottom depth, Crosses per cut, first-token states per depth of either model."""

    def __init__(self, cuts: Iterable[Cut], bottom_width: int, top_width: int) -> None:
        self.cuts = tuple(cuts)
        self.bottom_depths = tuple(sorted({k for k, _ in self.cuts}))
        self.top_depths = tuple(sorted({j for _, j in self.cuts}))
        self.grams = {k: Gram(bottom_width) for k in self.bottom_depths}
        self.crosses = {cut: Cross(bottom_width, top_width) for cut in self.cuts}
        self.first_bottom = {k: FirstStates(bottom_width) for k in self.bottom_depths}
        self.first_top = {j: FirstStates(top_width) for j in self.top_depths}

    def add(self, bottom: Mapping[int, Tensor], top: Mapping[int, Tensor]) -> None:
        """Counts sequences in: for every depth their states `[sequences, tokens, width]`."""
        for k in self.bottom_depths:
            self.first_bottom[k].add(bottom[k][:, 0])
            self.grams[k].add(bottom[k][:, 1:].flatten(0, 1))
        for j in self.top_depths:
            self.first_top[j].add(top[j][:, 0])
        for k, j in self.cuts:
            self.crosses[k, j].add(bottom[k][:, 1:].flatten(0, 1), top[j][:, 1:].flatten(0, 1))

    def state(self) -> dict[str, Tensor]:
        """Every sum under a name of its own; the tensors are those that are counted on."""
        parts: dict[str, Gram | Cross | FirstStates] = {f"gram.{k}": gram for k, gram in self.grams.items()}
        parts |= {f"cross.{k}.{j}": cross for (k, j), cross in self.crosses.items()}
        parts |= {f"first_bottom.{k}": first for k, first in self.first_bottom.items()}
        parts |= {f"first_top.{j}": first for j, first in self.first_top.items()}
        return {f"{part}.{name}": value for part, sums in parts.items() for name, value in sums.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state()` gave; KeyError where it is of other cuts."""
        for name, value in self.state().items():
            value.copy_(state[name])


class ClosedForm:
    """Stitches solved from a training and a held-out pass of the same cuts."""

    def __init__(self, training: Sums, held: Sums) -> None:
        self._training, self._held = training, held
        self._spreads: dict[int, Spread] = {}

    def spread(self, k: int) -> Spread:
        """The spread of the states at depth `k`, decomposed once."""
        if k not in self._spreads:
            self._spreads[k] = Spread(self._training.grams[k])
        return self._spreads[k]

    def ridge_fit(self, cut: Cut) -> RidgeFit:
        """The best ridge regression for `cut`; nothing is known of first tokens yet."""
        sums, held, k = self._training, self._held, cut[0]
        return fit_ridge(self.spread(k), sums.crosses[cut], sums.grams[k], held.grams[k], held.crosses[cut])

    def first_state(self, k: int) -> Tensor:
        """The bottom model's mean state of first tokens at depth `k`."""
        return self._training.first_bottom[k].mean()

    def first_target(self, j: int) -> Tensor:
        """The top model's mean state of first tokens at depth `j`."""
        return self._training.first_top[j].mean()

    def mean_square(self, k: int, weight: Tensor, bias: Tensor) -> float:
        """E |W x + b|² of the states x at depth `k`."""
        spread = self.spread(k)
        return float(spread.variances(weight).sum() + (weight @ spread.mean + bias).square().sum())

    def hold_first(self, k: int, fitted: AffineMap, target: Tensor, ridge: float) -> AffineMap:
        """`fitted` with the mean state of first tokens at depth `k` taken to `target`."""
        return holding(fitted, self.spread(k), self.first_state(k), target, ridge)
