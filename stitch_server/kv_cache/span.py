"""A `Span`: the new tokens of one sequence in a batch, and the KV blocks that hold the sequence."""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """`length` new tokens of a sequence after its `position` cached ones; `blocks` have room for all of them."""

    position: int
    length: int
    blocks: Sequenced[int]

    @property
    def end(self) -> int:
        """The KV length of the sequence once the new tokens are written."""
        return self.position + self.length


def slots_of(span: Span, block_tokens: int, device: torch.device) -> Tensor:
    """The slots of a sequence's tokens, cached and new, `[position + length]`."""
    blocks = torch.tensor(span.blocks, device=device)
    return (blocks[:, None] * block_tokens + torch.arange(block_tokens, device=device)).view(-1)[: span.end]
