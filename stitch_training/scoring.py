"""Cross-entropy, greedy tokens and intervals on held-out text, of whole models and of stitched ones.

A `Pipeline` computes from token ids. `tail_losses` and `whole_losses` compute from a held-out trace, so that the bottom
model's layers don't run again. Intervals resample whole sequences, since tokens of one sequence are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitch_server.model.adapters import Adapters
from stitch_server.model.stitch import Stitch
from stitch_training.activations import PassResult
from stitch_training.least_squares import AffineMap, CutPoint
from stitch_training.models import LOGIT_TOKENS, FrozenModel, Pair, next_token_losses

# The bottom's states `[sequences, tokens, inputs]` to the top's, `[sequences, tokens, outputs]`.
Mapping = Callable[[Tensor], Tensor]
# The same for packed tokens, `[tokens, inputs]`, with the indices of the tokens that start a sequence.
PackedMapping = Callable[[Tensor, Sequence[int]], Tensor]
BATCH_SEQUENCES = 4
RESAMPLES = 1000
WHOLE_LOSSES = "whole-losses.safetensors"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def map_of(stitch: Stitch) -> AffineMap:
    """Returns a stitch's affine map in float64, without its adapters."""
    first = None if stitch.first is None else stitch.first.double()
    return AffineMap(stitch.weight.double(), stitch.bias.double(), first)


def mapping_of(stitch: AffineMap) -> Mapping:
    """Returns a map as a shard applies it, for whole sequences."""
    return partial(_map_sequences, packed_mapping_of(stitch))


def packed_mapping_of(stitch: AffineMap) -> PackedMapping:
    """Returns a map as a shard applies it, for packed tokens."""
    weight, bias = stitch.weight.float(), stitch.bias.float()
    first = None if stitch.first is None else stitch.first.float()

    def mapping(states: Tensor, starts: Sequence[int]) -> Tensor:
        mapped = torch.nn.functional.linear(states.float(), weight, bias)
        if first is not None:
            mapped[list(starts)] = first
        return mapped

    return mapping


def _map_sequences(mapping: PackedMapping, states: Tensor) -> Tensor:
    sequences, tokens, _ = states.shape
    return mapping(states.flatten(0, 1), range(0, sequences * tokens, tokens)).view(sequences, tokens, -1)


@dataclass(frozen=True)
class Stage:
    """Layers [first, end) of one model, with adapters beside them."""

    model: FrozenModel
    first: int
    end: int
    adapters: Adapters | None = None


@dataclass(frozen=True)
class Pipeline:
    """The stages that text passes in order; the head is that of the last stage's model."""

    stages: tuple[Stage, ...]
    # Applied between two stages.
    between: PackedMapping = lambda states, starts: states

    @property
    def head(self) -> FrozenModel:
        """The model whose head gives the logits."""
        return self.stages[-1].model

    def states(self, tokens: Tensor) -> Tensor:
        """Returns last-layer states `[sequences, tokens, hidden]` of token ids `[sequences, tokens]`."""
        hidden = self.stages[0].model.embed(tokens)
        for index, stage in enumerate(self.stages):
            hidden = _map_sequences(self.between, hidden) if index else hidden
            hidden = stage.model.run(hidden, stage.first, stage.end, stage.adapters)
        return hidden


def whole(model: FrozenModel) -> Pipeline:
    """Returns a whole model as a pipeline of one stage."""
    return Pipeline((Stage(model, 0, model.depth),))


def stitched(pair: Pair, cut: CutPoint, stitch: AffineMap, adapters: Adapters | None = None) -> Pipeline:
    """Returns the bottom's layers [0, k), an affine map, and the top's layers [j, …) with their adapters."""
    stages = Stage(pair.bottom, 0, cut.k), Stage(pair.top, cut.j, pair.top.depth, adapters)
    return Pipeline(stages, packed_mapping_of(stitch))


def without_layers(model: FrozenModel, cut: CutPoint) -> Pipeline:
    """Returns one model without its layers [k, j), the baseline of a stitch within one model."""
    return Pipeline((Stage(model, 0, cut.k), Stage(model, cut.j, model.depth)))


def sequence_losses(pipeline: Pipeline, tokens: Tensor) -> Tensor:
    """Returns the mean cross-entropy `[sequences]` in nats per token of token ids `[sequences, tokens]`."""
    with torch.no_grad():
        parts = [
            next_token_losses(pipeline.head, pipeline.states(batch), batch).mean(1)
            for batch in torch.split(tokens, BATCH_SEQUENCES)
        ]
    return torch.cat(parts).double()


def greedy_tokens(pipeline: Pipeline, tokens: Tensor) -> Tensor:
    """Returns the likeliest next token after every token, `[sequences, tokens]`."""
    with torch.no_grad():
        states = torch.cat([pipeline.states(batch) for batch in torch.split(tokens, BATCH_SEQUENCES)]).flatten(0, 1)
        greedy = [pipeline.head.logits(some).argmax(1) for some in torch.split(states, LOGIT_TOKENS)]
    return torch.cat(greedy).view(tokens.shape)


def tail_losses(
    top: FrozenModel, held_out: PassResult, cut: CutPoint, mapping: Mapping, adapters: Adapters | None = None
) -> Tensor:
    """Returns the mean cross-entropy `[sequences]` of the top's layers [j, …) after `mapping` of the traced states."""
    losses, (k, j) = [], cut
    with torch.no_grad():
        for rows in torch.split(torch.arange(held_out.sequences), BATCH_SEQUENCES):
            hidden = top.run(mapping(held_out.trace.hidden(k, rows)), j, top.depth, adapters)
            losses.append(next_token_losses(top, hidden, held_out.trace.tokens(rows)).mean(1))
    return torch.cat(losses).double()


def whole_losses(pair: Pair, held_out: PassResult, folder: Path) -> dict[str, Tensor]:
    """Returns the mean cross-entropy `[sequences]` of the whole `bottom` and `top` models, computed once per folder."""
    path = folder / WHOLE_LOSSES
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata()["data"] == held_out.fingerprint:
                return {name: file.get_tensor(name) for name in ("bottom", "top")}
    bottom = _bottom_losses(pair.bottom, held_out)
    top = bottom.clone() if pair.top is pair.bottom else _losses_from_tokens(pair.top, held_out)
    losses = {"bottom": bottom, "top": top}
    save_file(losses, path, {"data": held_out.fingerprint})
    return losses


def _bottom_losses(model: FrozenModel, held_out: PassResult) -> Tensor:
    """Runs the head alone where the trace has the last layer's states."""
    if model.depth in held_out.trace.shape.depths:
        return tail_losses(model, held_out, CutPoint(model.depth, model.depth), lambda states: states)
    return _losses_from_tokens(model, held_out)


def _losses_from_tokens(model: FrozenModel, held_out: PassResult) -> Tensor:
    return sequence_losses(whole(model), held_out.trace.tokens(torch.arange(held_out.sequences)))


def bootstrap(values: Tensor, seed: int = 0) -> Interval:
    """Returns the mean of `values` `[sequences]` with its percentile interval."""
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=draw)
    means = values[picks].mean(1).sort().values
    low, high = int(RESAMPLES * 0.025), int(RESAMPLES * 0.975)
    return Interval(float(values.mean()), float(means[low]), float(means[high]))


def by_file(values: Tensor, files: Tensor, names: Sequence[str]) -> dict[str, Interval]:
    """Returns the interval of `values` `[sequences]` over `all`, and of every file that has any sequence.

    `files` `[sequences]` are indices into `names`.
    """
    intervals = {"all": bootstrap(values)}
    for number, name in enumerate(names):
        if (files == number).any():
            intervals[name] = bootstrap(values[files == number])
    return intervals
