"""How well a model, or two halves and a stitch, predict held-out text. Knows no file and no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stitch_server.model.adapters import Adapters
from stitch_server.model.stitch import Stitch
from stitch_training.frozen_models import LOGIT_ROWS, FrozenModel, Pair, next_token_losses
from stitch_training.least_squares import AffineMap
from stitch_training.sums import Cut

# The bottom's states `[sequences, tokens, inputs]` to the top's, `[sequences, tokens, outputs]`.
Mapping = Callable[[Tensor], Tensor]
# The same for packed rows, of which some begin a sequence: `[rows, inputs]` and their indices.
RowMapping = Callable[[Tensor, Sequence[int]], Tensor]
BATCH_SEQUENCES = 4
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies in 95 of 100 resamplings of the sequences."""

    mean: float
    low: float
    high: float


def map_of(stitch: Stitch) -> AffineMap:
    """What a stitch does between the models."""
    first = None if stitch.first is None else stitch.first.double()
    return AffineMap(stitch.weight.double(), stitch.bias.double(), first)


def applied(stitch: AffineMap) -> Mapping:
    """A map as a shard applies it."""
    return partial(_on_sequences, on_rows(stitch))


def on_rows(stitch: AffineMap) -> RowMapping:
    """The same for packed rows."""
    weight, bias = stitch.weight.float(), stitch.bias.float()
    first = None if stitch.first is None else stitch.first.float()

    def mapping(rows: Tensor, begins: Sequence[int]) -> Tensor:
        mapped = torch.nn.functional.linear(rows.float(), weight, bias)
        if first is not None:
            mapped[list(begins)] = first
        return mapped

    return mapping


def _on_sequences(mapping: RowMapping, states: Tensor) -> Tensor:
    sequences, tokens, _ = states.shape
    return mapping(states.flatten(0, 1), range(0, sequences * tokens, tokens)).view(sequences, tokens, -1)


@dataclass(frozen=True)
class Leg:
    """Layers [first, end) of one model."""

    model: FrozenModel
    first: int
    end: int
    adapters: Adapters | None = None


@dataclass(frozen=True)
class System:
    """What text passes: one leg after the other, and the head of the last one's model."""

    legs: tuple[Leg, ...]
    # Between two legs.
    between: RowMapping = lambda rows, begins: rows

    @property
    def head(self) -> FrozenModel:
        """The model whose head answers."""
        return self.legs[-1].model

    def states(self, tokens: Tensor) -> Tensor:
        """`[sequences, tokens]` to the states behind the last layer, `[sequences, tokens, hidden]`."""
        hidden = self.legs[0].model.embed(tokens)
        for index, leg in enumerate(self.legs):
            hidden = _on_sequences(self.between, hidden) if index else hidden
            hidden = leg.model.run(hidden, leg.first, leg.end, leg.adapters)
        return hidden


def alone(model: FrozenModel) -> System:
    """A model by itself."""
    return System((Leg(model, 0, model.depth),))


def stitched(pair: Pair, cut: Cut, stitch: AffineMap, adapters: Adapters | None = None) -> System:
    """The bottom's layers [0, k), an affine map, the top's layers [j, …) with their adapters."""
    return System((Leg(pair.bottom, 0, cut[0]), Leg(pair.top, cut[1], pair.top.depth, adapters)), on_rows(stitch))


def left_out(model: FrozenModel, cut: Cut) -> System:
    """One model with its layers [k, j) left out: what a stitch inside it must beat."""
    return System((Leg(model, 0, cut[0]), Leg(model, cut[1], model.depth)))


def losses(system: System, tokens: Tensor) -> Tensor:
    """Mean cross-entropy `[sequences]` in nats a token over held-out `tokens` `[sequences, tokens]`."""
    with torch.no_grad():
        parts = [
            next_token_losses(system.head, system.states(part), part).mean(1)
            for part in torch.split(tokens, BATCH_SEQUENCES)
        ]
    return torch.cat(parts).double()


def greedy_tokens(system: System, tokens: Tensor) -> Tensor:
    """The likeliest next token after every token, `[sequences, tokens]`."""
    with torch.no_grad():
        rows = torch.cat([system.states(part) for part in torch.split(tokens, BATCH_SEQUENCES)]).flatten(0, 1)
        chosen = [system.head.logits(part).argmax(1) for part in torch.split(rows, LOGIT_ROWS)]
    return torch.cat(chosen).view(tokens.shape)


def bootstrapped(values: Tensor, seed: int = 0) -> Interval:
    """The mean of `values` `[sequences]` with its percentile interval; sequences are resampled as wholes."""
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=draw)
    means = values[picks].mean(1).sort().values
    low, high = int(RESAMPLES * 0.025), int(RESAMPLES * 0.975)
    return Interval(float(values.mean()), float(means[low]), float(means[high]))


def by_file(values: Tensor, files: Tensor, names: Sequence[str]) -> dict[str, Interval]:
    """`values` `[sequences]` overall, and apart for every file that has any; `files` says which each is from."""
    intervals = {"all": bootstrapped(values)}
    for number, name in enumerate(names):
        if (files == number).any():
            intervals[name] = bootstrapped(values[files == number])
    return intervals
