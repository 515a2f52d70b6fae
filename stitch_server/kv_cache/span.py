"""Where a batch's sequences lie in the cache, and what its attention offers. Computes nothing of it."""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stitch_server.cpu.attention.paged_kv import PagedKV


@dataclass(frozen=True, slots=True)
class Span:
    """Where consecutive new tokens of one sequence lie: they extend `position` cached ones in `blocks`."""

    position: int
    length: int
    blocks: Sequenced[int]

    @property
    def end(self) -> int:
        return self.position + self.length


def slots_of(span: Span, block_tokens: int, device: torch.device) -> Tensor:
    """The slots of a sequence's past and present, `[position + length]`."""
    blocks = torch.tensor(span.blocks, device=device)
    return (blocks[:, None] * block_tokens + torch.arange(block_tokens, device=device)).view(-1)[: span.end]


def within(slots: Tensor, window: int | None) -> Tensor:
    """Those of a sequence's slots that its newest token sees."""
    return slots if window is None else slots[-window:]


class BatchAttend(Protocol):
    """Keeps one batch's keys and values, and attends."""

    @property
    def paged(self) -> PagedKV | None:
        """Where the batch's tokens lie, for kernels that keep and attend themselves; None where those don't suit."""
        ...

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `model.attend.Attend` says."""
        ...

    def first(self, segments: int) -> BatchAttend:
        """The same for the leading `segments` of the batch alone; the others have left or not yet joined."""
        ...
