"""Low-rank adapters, which a route may add to the top model's layers.

Beside layer i, tokens of a route with adapters of rank r pass a bottleneck of r values,

    h_{i+1} = layer_i(h_i) + B_i silu(A_i h_i / rms(h_i)),

the parallel adapter of He et al., *Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv 2110.04366,
around the whole layer. So adapters fit every family, and routes with other adapters or none share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch.errors import Incompatible
from stitch_server.devices import as_float32

if TYPE_CHECKING:
    from stitch_server.cpu import Floats

# Keeps a token of zeros from being divided by zero.
EPSILON = 1e-6


@dataclass(frozen=True)
class Adapters:
    """One adapter for each layer from `first` on."""

    first: int
    # [layers, rank, hidden]
    down: Tensor
    # [layers, hidden, rank]
    up: Tensor

    def __post_init__(self) -> None:
        found = tuple(self.down.shape), tuple(self.up.shape)
        if len(found[0]) != 3 or found[1] != (found[0][0], found[0][2], found[0][1]):
            raise Incompatible(f"adapters with {found[0]} down and {found[1]} up do not fit together")

    @property
    def end(self) -> int:
        """The end of the range of layers, exclusive."""
        return self.first + len(self.down)

    @property
    def width(self) -> int:
        """The hidden size of the layers."""
        return self.down.shape[2]

    @property
    def rank(self) -> int:
        """The size of a bottleneck."""
        return self.down.shape[1]

    @property
    def parameters(self) -> int:
        """The parameters that one token reads."""
        return self.down.numel() + self.up.numel()

    @cached_property
    def as_read_by_kernels(self) -> tuple[Floats, Floats]:
        """`down` and `up` in float32, both [layers, rank, hidden]: an output's weights are read rank by rank."""
        return as_float32(self.down), as_float32(self.up.transpose(1, 2))

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapters:
        """Returns the same adapters on another device or in another dtype."""
        return Adapters(self.first, self.down.to(device, dtype), self.up.to(device, dtype))

    def between(self, first: int, end: int) -> Adapters | None:
        """Returns the adapters of layers [first, end), or None if there are none."""
        first, end = max(first, self.first), min(end, self.end)
        if first >= end:
            return None
        kept = slice(first - self.first, end - self.first)
        return Adapters(first, self.down[kept].clone(), self.up[kept].clone())

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """Returns what is added to the output of `layer`, given its input `[tokens, hidden]` of any dtype."""
        at = layer - self.first
        normed = F.rms_norm(hidden, hidden.shape[-1:], None, EPSILON).to(self.down.dtype)
        narrow = F.linear(normed, self.down[at])
        return F.linear(F.silu(narrow), self.up[at])
