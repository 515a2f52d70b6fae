"""Native decoder layers of the Llama-like families, with as few operations as the arithmetic allows.

Queries, keys and values come from one matmul, gate and up projections from another. The rows of the query and key
matrices are stored in another order than in the file, so that the two values that a rotation mixes are neighbours and
the whole rotation is one complex multiplication in place; attention is invariant to a permutation of both.
`llama_loader.py` reads these layers from a model folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stitch_server.attention import Attend, Rotary
from stitch_server.model.linear import Linear
from stitch_server.model.llama_config import FAMILIES, ROPE_TYPES, LlamaConfig
from stitch_server.model.rope import inverse_frequencies
from stitch_server.model.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The smallest table of rotations.
MIN_TABLE_POSITIONS = 4096


def supports(config: PretrainedConfig) -> bool:
    """Whether native layers compute what the model's own layers would."""
    rope_type = config.rope_parameters["rope_type"]
    return config.model_type in FAMILIES and config.hidden_act == "silu" and rope_type in ROPE_TYPES


class RotaryAngles:
    """RoPE's rotations by position, with the scaling that the model's configuration asks for."""

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        frequencies, radius = inverse_frequencies(config)
        self._frequencies, self._radius = frequencies.to(device), torch.tensor(radius, device=device)
        self._table = np.empty((0, len(self._frequencies)), np.complex64)

    def __call__(self, positions: Tensor) -> Rotary:
        """Returns complex rotations `[tokens, 1, head_dim / 2]` of positions `[tokens]`."""
        angles = positions.to(torch.float32).unsqueeze(1) * self._frequencies
        return (torch.polar(self._radius.expand_as(angles), angles).unsqueeze(1),)

    def table(self, positions: int) -> NDArray[np.complex64]:
        """Returns rotations of at least `positions` positions, `[positions, head_dim / 2]`; grows on demand."""
        if positions > len(self._table):
            count = max(MIN_TABLE_POSITIONS, 1 << (positions - 1).bit_length())
            self._table = self(torch.arange(count))[0].flatten(1).numpy()
        return self._table


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / sqrt(mean(x²) + ε) · weight: https://arxiv.org/abs/1910.07467."""

    weight: Tensor
    epsilon: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[tokens, hidden_size]` in and out."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def load_norm(config: LlamaConfig, name: str, weights: Weights) -> RmsNorm:
    """Reads the norm of that name. Raises Incompatible if the folder lacks it."""
    return RmsNorm(weights.read(f"{name}.weight"), config.rms_norm_eps)


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One decoder layer: attention and a gated feed-forward network, each after an RMS norm."""

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    attention_norm: RmsNorm
    query_key_value: Linear
    # [heads + kv_heads, head_dim]; None where the family has none.
    query_key_norm: Tensor | None
    query_key_epsilon: float
    attention_output: Linear
    feed_forward_norm: RmsNorm
    gate_up: Linear
    down: Linear

    def __call__(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Takes and returns `[tokens, hidden_size]`; leaves its arguments unchanged."""
        hidden = self.add_attention(hidden, rotary, attend)
        return self.feed_forward(self.normalize(hidden)).add_(hidden)

    def add_attention(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Takes the layer's input, `[tokens, hidden_size]`, and returns the state after its attention."""
        return self._attention(self.attention_norm(hidden), rotary, attend).add_(hidden)

    def normalize(self, hidden: Tensor) -> Tensor:
        """Takes the state after the attention and returns the input of the feed-forward network."""
        return self.feed_forward_norm(hidden)

    def feed_forward(self, normed: Tensor) -> Tensor:
        """Takes its input, `[tokens, hidden_size]`, and returns what the network adds to the state."""
        gate, up = self.gate_up(normed).chunk(2, dim=1)
        return self.down(F.silu(gate).mul_(up))

    def _attention(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        qkv = self.query_key_value(hidden).view(len(hidden), -1, self.head_dim)
        rotated = self.heads + self.kv_heads
        query_key, value = qkv[:, :rotated], qkv[:, rotated:]
        if self.query_key_norm is not None:
            query_key = F.rms_norm(query_key, (self.head_dim,), None, self.query_key_epsilon).mul_(self.query_key_norm)
        query_key = _rotate(query_key, rotary[0])
        query, key = query_key[:, : self.heads], query_key[:, self.heads :]
        return self.attention_output(attend(self.index, query, key, value, self.head_dim**-0.5, self.window))


def _rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Rotates neighbouring pairs of `[tokens, heads, head_dim]`; in place if it is float32."""
    exact = vectors.float()
    torch.view_as_complex(exact.view(*exact.shape[:2], -1, 2)).mul_(rotation)
    return exact.to(vectors.dtype)
