"""A pass in which some tokens begin after lower layers, since their hidden states there are kept.

`run_after_kept` computes the layers after the kept states first, one run for each layer that states are from, and then
all other tokens from the shard's first layer on. So a token's KV is written before a later token of its session reads
it, and the leading rows of each run pass the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from stitch_server.devices import to_device_async
from stitch_server.engine.types import LayerRange, RouteDecision, Segment

RunLayers = Callable[[Sequence[Segment], Tensor], Tensor]
# The same with the route decisions by segment index.
RunAndDecide = Callable[[Sequence[Segment], Tensor], tuple[Tensor, Mapping[int, RouteDecision]]]


def run_after_kept(
    run_layers: RunLayers, run_others: RunAndDecide, segments: Sequence[Segment], hidden: Tensor
) -> tuple[Tensor, dict[int, RouteDecision]]:
    """Hidden states `[tokens, hidden]` through the layers of all segments, and the route decisions by segment index.

    `run_layers` computes tokens with kept states, `run_others` all others.
    """
    starts = list(accumulate((one.length for one in segments), initial=0))
    output = torch.empty_like(hidden)
    layers = {one.kept.layer for one in segments if one.kept is not None}
    for layer in sorted(layers, reverse=True):
        indices = [index for index, one in enumerate(segments) if one.kept is not None and one.kept.layer == layer]
        indices.sort(key=lambda index: -segments[index].layers.end)
        leading = [_leading(segments[index]) for index in indices]
        states = torch.cat([states for _, states in leading])
        spans = [(starts[index], one.length) for index, (one, _) in zip(indices, leading, strict=True)]
        output[_rows(spans, hidden)] = run_layers([one for one, _ in leading], states)
    others = [(index, rest) for index, one in enumerate(segments) if (rest := _rest(one)) is not None]
    if not others:
        return output, {}
    rows = _rows([(starts[index + 1] - rest.length, rest.length) for index, rest in others], hidden)
    output[rows], decisions = run_others([rest for _, rest in others], hidden[rows])
    return output, {others[at][0]: decision for at, decision in decisions.items()}


def _leading(segment: Segment) -> tuple[Segment, Tensor]:
    """The tokens with kept states, from these on."""
    if (kept := segment.kept) is None:
        raise ValueError("a segment without kept states can't begin after them")
    layers = LayerRange(kept.layer, segment.layers.end)
    return replace(segment, layers=layers, length=len(kept.states), kept=None), kept.states


def _rest(segment: Segment) -> Segment | None:
    """The tokens without kept states; None where all have some."""
    done = 0 if segment.kept is None else len(segment.kept.states)
    if done == segment.length:
        return None
    return replace(segment, position=segment.position + done, length=segment.length - done, kept=None)


def _rows(spans: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """The indices of rows, given by their first one and number."""
    rows = torch.cat([torch.arange(first, first + count) for first, count in spans])
    return to_device_async(rows, like.device)
