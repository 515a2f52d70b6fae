"""Sequences that earlier passes took through the bottom model, found by their tokens. Runs no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from stitch_training.trace import Trace


class Known:
    """Traces of other passes. Their hidden states are rounded to bfloat16, as all that a trace keeps."""

    def __init__(self, traces: Iterable[Trace] = ()) -> None:
        self._places: dict[bytes, tuple[Trace, int]] = {}
        for trace in traces:
            for row in range(trace.shape.sequences):
                self._places.setdefault(_key(trace.tokens(torch.tensor([row]))), (trace, row))

    def runs(self, tokens: Tensor) -> Iterator[tuple[slice, tuple[Trace, Tensor] | None]]:
        """`tokens` `[sequences, tokens]` in slices, each with its rows of one trace, or None where none knows them."""
        places = [self._places.get(_key(sequence)) for sequence in tokens]
        start = 0
        for trace, run in groupby(places, key=lambda place: None if place is None else place[0]):
            found = list(run)
            end = start + len(found)
            rows = torch.tensor([place[1] for place in found if place is not None])
            yield slice(start, end), None if trace is None else (trace, rows)
            start = end


def _key(tokens: Tensor) -> bytes:
    return hashlib.sha256(tokens.numpy().tobytes()).digest()
