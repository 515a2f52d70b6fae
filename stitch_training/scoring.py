"""Cross-entropy, divergence and the likeliest tokens on held-out text, of whole models and of stitched ones.

A `Pipeline` computes from token ids. `tail_scores` and `whole_losses` compute from a held-out trace, so that the bottom
model's layers don't run again. All give a value for every next token, `[sequences, tokens - 1]`; `Slices` says which of
them count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitch_server.model.adapters import Adapters
from stitch_server.model.ffn_skip import FfnSkip
from stitch_server.model.stitch import Stitch
from stitch_training.activations import PassResult
from stitch_training.data import CONTENT, CONTENT_SLICE, COUNTED_ROLES, LossOn, Role
from stitch_training.device import batch_sequences
from stitch_training.intervals import Sample
from stitch_training.least_squares import AffineMap, CutPoint
from stitch_training.models import LOGIT_TOKENS, FrozenModel, Pair
from stitch_training.objective import divergence
from stitch_training.trace import Teacher

# The bottom's states `[sequences, tokens, inputs]` to the top's, `[sequences, tokens, outputs]`.
Mapping = Callable[[Tensor], Tensor]
# The same for packed tokens, `[tokens, inputs]`, with the indices of the tokens that start a sequence.
PackedMapping = Callable[[Tensor, Sequence[int]], Tensor]
WHOLE_LOSSES = "whole-losses.safetensors"
# Of a sequence of plain text, where it is measured what tokens cost that are generated.
PROMPT_TOKENS = 32


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
        mapped = F.linear(states.float(), weight, bias)
        if first is not None:
            mapped[list(starts)] = first
        return mapped

    return mapping


def _map_sequences(mapping: PackedMapping, states: Tensor) -> Tensor:
    sequences, tokens, _ = states.shape
    return mapping(states.flatten(0, 1), range(0, sequences * tokens, tokens)).view(sequences, tokens, -1)


@dataclass(frozen=True)
class Stage:
    """Layers [first, end) of one model, with adapters beside them, or gates by which generated tokens skip FFNs."""

    model: FrozenModel
    first: int
    end: int
    adapters: Adapters | None = None
    skip: FfnSkip | None = None


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

    def states(self, tokens: Tensor, generated: Tensor | None = None) -> Tensor:
        """Returns last-layer states `[sequences, tokens, hidden]` of token ids `[sequences, tokens]`.

        `generated`, of the same shape, says which tokens may skip FFNs; None: none of them.
        """
        hidden = self.stages[0].model.embed(tokens)
        for index, stage in enumerate(self.stages):
            hidden = _map_sequences(self.between, hidden) if index else hidden
            hidden = stage.model.run(hidden, stage.first, stage.end, stage.adapters, stage.skip, generated)
        return hidden


def whole(model: FrozenModel) -> Pipeline:
    """Returns a whole model as a pipeline of one stage."""
    return Pipeline((Stage(model, 0, model.depth),))


def stitched(pair: Pair, cut: CutPoint, stitch: AffineMap, adapters: Adapters | None = None) -> Pipeline:
    """Returns the bottom's layers [0, k), an affine map, and the top's layers [j, …) with their adapters."""
    stages = Stage(pair.bottom, 0, cut.k), Stage(pair.top, cut.j, pair.top.depth, adapters)
    return Pipeline(stages, packed_mapping_of(stitch))


@dataclass(frozen=True, eq=False)
class TextScores:
    """Of every next token, on the CPU: its cross-entropy in nats, and the token that was the likeliest there."""

    losses: Tensor
    likeliest: Tensor


def text_scores(pipeline: Pipeline, tokens: Tensor, generated: Tensor | None = None) -> TextScores:
    """Scores `tokens` `[sequences, tokens]`, of which the `generated` ones may skip FFNs."""
    losses, likeliest = [], []
    size = batch_sequences(pipeline.head.device)
    parts = [None] * len(tokens) if generated is None else torch.split(generated, size)
    with torch.no_grad():
        for batch, part in zip(torch.split(tokens, size), parts, strict=False):
            states = pipeline.states(batch, part)[:, :-1].flatten(0, 1)
            following = batch[:, 1:].flatten().to(states.device)
            for some, ids in zip(torch.split(states, LOGIT_TOKENS), torch.split(following, LOGIT_TOKENS), strict=True):
                logits = pipeline.head.logits(some)
                losses.append(F.cross_entropy(logits, ids, reduction="none"))
                likeliest.append(logits.argmax(1))
    shape = (len(tokens), -1)
    return TextScores(torch.cat(losses).view(shape).cpu(), torch.cat(likeliest).view(shape).cpu())


@dataclass(frozen=True)
class TailScores:
    """Of every next token, on the CPU: its cross-entropy, and the divergence from the traced teacher, in nats."""

    losses: Tensor
    divergences: Tensor

    def objective(self, teacher_share: float) -> Tensor:
        """Returns what training minimizes: the share of the divergence and the rest of the cross-entropy."""
        return teacher_share * self.divergences + (1 - teacher_share) * self.losses


def tail_scores(
    pair: Pair, held_out: PassResult, cut: CutPoint, mapping: Mapping, adapters: Adapters | None = None
) -> TailScores:
    """Scores the top's layers [j, …) after `mapping` of the traced states."""
    top, device, trace, (k, j) = pair.top, pair.device, held_out.trace, cut
    losses, diverging = [], []
    with torch.no_grad():
        for rows in torch.split(torch.arange(held_out.sequences), batch_sequences(device)):
            mapped = mapping(trace.hidden(k, rows).to(device))
            states = top.run(mapped, j, top.depth, adapters)[:, :-1].flatten(0, 1)
            teacher, following = trace.teacher(rows).to(device), trace.tokens(rows)[:, 1:].flatten().to(device)
            ids, logprobs = (kept[:, :-1].flatten(0, 1) for kept in (teacher.ids, teacher.logprobs))
            for start in range(0, len(states), LOGIT_TOKENS):
                chunk = slice(start, start + LOGIT_TOKENS)
                logits = top.logits(states[chunk])
                losses.append(F.cross_entropy(logits, following[chunk], reduction="none"))
                diverging.append(divergence(logits[:, : pair.vocabulary], Teacher(ids[chunk], logprobs[chunk])))
    shape = (held_out.sequences, -1)
    return TailScores(torch.cat(losses).view(shape).cpu(), torch.cat(diverging).view(shape).cpu())


def whole_losses(pair: Pair, held_out: PassResult, folder: Path) -> dict[str, Tensor]:
    """Returns the losses of the whole `bottom` and `top` models, computed once per folder."""
    path = folder / WHOLE_LOSSES
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata()["data"] == held_out.fingerprint:
                return {name: file.get_tensor(name) for name in ("bottom", "top")}
    bottom = _bottom_losses(pair, held_out)
    top = bottom.clone() if pair.top is pair.bottom else _losses_from_tokens(pair.top, held_out)
    losses = {"bottom": bottom, "top": top}
    save_file(losses, path, {"data": held_out.fingerprint})
    return losses


def _bottom_losses(pair: Pair, held_out: PassResult) -> Tensor:
    """Runs the head alone where the trace has the last layer's states."""
    depth = pair.bottom.depth
    if depth in held_out.trace.shape.depths:
        itself = Pair(pair.bottom, pair.bottom, pair.vocabulary)
        return tail_scores(itself, held_out, CutPoint(depth, depth), lambda states: states).losses
    return _losses_from_tokens(pair.bottom, held_out)


def _losses_from_tokens(model: FrozenModel, held_out: PassResult) -> Tensor:
    return text_scores(whole(model), held_out.trace.tokens(torch.arange(held_out.sequences))).losses


def counted(roles: Tensor, loss_on: LossOn) -> Tensor:
    """Returns which next tokens training counts, bool `[sequences, tokens - 1]`, of roles `[sequences, tokens]`."""
    return torch.isin(roles[:, 1:], torch.tensor(COUNTED_ROLES[loss_on]))


def generated_tokens(roles: Tensor) -> Tensor:
    """Returns which tokens count as generated, bool, of roles `[sequences, tokens]`: those of answers and of texts.

    The first PROMPT_TOKENS tokens of a sequence are a prompt where they are plain text.
    """
    is_text = (roles == Role.PLAIN) & (torch.arange(roles.shape[1]) >= PROMPT_TOKENS)
    return is_text | torch.isin(roles, torch.tensor(COUNTED_ROLES["assistant"]))


@dataclass(frozen=True, eq=False)
class Slices:
    """Which next tokens count, bool `[sequences, tokens - 1]`: all content, the content of each file, each role."""

    masks: dict[str, Tensor]

    @classmethod
    def of(cls, roles: Tensor, files: Tensor, names: Sequence[str], after: Tensor | None = None) -> Slices:
        """Takes the roles `[sequences, tokens]` and the files `[sequences]`, as indices into `names`.

        Next tokens count `after` these tokens alone, bool `[sequences, tokens]`; None: after all.
        """
        following = roles[:, 1:]
        content = torch.isin(following, torch.tensor(CONTENT))
        masks = {CONTENT_SLICE: content}
        masks |= {name: content & (files == number)[:, None] for number, name in enumerate(names)}
        masks |= {role.name.lower(): following == role for role in Role}
        masks = masks if after is None else {name: mask & after[:, :-1] for name, mask in masks.items()}
        return cls({name: mask for name, mask in masks.items() if mask.any()})

    @classmethod
    def of_pass(cls, held_out: PassResult, names: Sequence[str]) -> Slices:
        """Takes the sequences of a pass."""
        rows = torch.arange(held_out.sequences)
        return cls.of(held_out.trace.roles(rows), held_out.trace.files(rows), names)

    def samples(self, values: Tensor) -> dict[str, Sample]:
        """Returns the sample of each slice of values `[sequences, tokens - 1]`."""
        return {name: Sample.of_tokens(values, mask) for name, mask in self.masks.items()}
