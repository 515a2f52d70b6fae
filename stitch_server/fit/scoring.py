"""How well a model, or two halves and a stitch, predict held-out text. Knows no file and no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stitch_server.fit.frozen import LOGIT_ROWS, FrozenModel, Pair, next_token_losses
from stitch_server.fit.leastsquares import AffineMap
from stitch_server.fit.sums import Cut

# A system takes tokens [sequences, tokens] to the states behind the last layer of the model that has its head.
System = Callable[[Tensor], Tensor]
BATCH_SEQUENCES = 4
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies in 95 of 100 resamplings of the sequences."""

    mean: float
    low: float
    high: float


def alone(model: FrozenModel) -> System:
    """A model by itself."""
    return lambda tokens: model.run(model.embed(tokens), 0, model.depth)


def stitched(pair: Pair, cut: Cut, stitch: AffineMap) -> System:
    """The bottom's layers [0, k), an affine map on every token, the first one too, the top's layers [j, …)."""
    weight, bias, (k, j) = stitch.weight.float(), stitch.bias.float(), cut

    def run(tokens: Tensor) -> Tensor:
        states = pair.bottom.run(pair.bottom.embed(tokens), 0, k).float()
        return pair.top.run(torch.nn.functional.linear(states, weight, bias), j, pair.top.depth)

    return run


def left_out(model: FrozenModel, cut: Cut) -> System:
    """One model with its layers [k, j) left out: what a stitch inside it must beat."""
    k, j = cut
    return lambda tokens: model.run(model.run(model.embed(tokens), 0, k), j, model.depth)


def losses(head: FrozenModel, system: System, tokens: Tensor) -> Tensor:
    """Mean cross-entropy `[sequences]` in nats a token over held-out `tokens` `[sequences, tokens]`."""
    with torch.no_grad():
        parts = [next_token_losses(head, system(part), part).mean(1) for part in torch.split(tokens, BATCH_SEQUENCES)]
    return torch.cat(parts).double()


def greedy_tokens(head: FrozenModel, system: System, tokens: Tensor) -> Tensor:
    """The likeliest next token after every token, `[sequences, tokens]`."""
    with torch.no_grad():
        rows = torch.cat([system(part) for part in torch.split(tokens, BATCH_SEQUENCES)]).flatten(0, 1)
        chosen = [head.logits(part).argmax(1) for part in torch.split(rows, LOGIT_ROWS)]
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
