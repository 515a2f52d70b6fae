"""Whole decoder layers for a few tokens, one behind the other in one call. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stitch_server.loops.attention import Past, attend, keep
from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Places, exponential
from stitch_server.loops.products import Matrix, multiply


class Layers(NamedTuple):
    """Decoder layers of one shape; every array, also of a matrix, begins with an axis for the layer."""

    # In the whole model.
    first: int
    attention_norm: Floats
    query_key_value: Matrix
    # [layers, rotated heads, head_dim]; [layers, 0, head_dim] where the family has none.
    query_key_norm: Floats
    attention_output: Matrix
    feed_forward_norm: Floats
    gate_up: Matrix
    down: Matrix
    # How many tokens back one sees, itself included; 0: all.
    windows: Places


@compiled()
def run(
    hidden: Floats, turns: NDArray[np.complex64], layers: Layers, first: int, end: int, past: Past, epsilon: float
) -> None:
    """A few tokens' `hidden` `[tokens, hidden_size]` through layers [first, end) of the whole model, in place.

    `turns` `[tokens, head_dim / 2]` are what queries and keys are rotated by.
    """
    tokens, head_dim = len(hidden), past.pairs.shape[3]
    kept = past.pairs.shape[2]
    all_heads = layers.query_key_value.weight.shape[1] // head_dim
    heads = all_heads - kept
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    inner = layers.down.weight.shape[2]
    normed = np.empty_like(hidden)
    asked = np.empty((tokens, all_heads, head_dim), np.float32)
    mixed = np.empty((tokens, heads, head_dim), np.float32)
    added = np.empty_like(hidden)
    both = np.empty((tokens, 2 * inner), np.float32)
    gated = np.empty((tokens, inner), np.float32)
    for layer in range(first - layers.first, end - layers.first):
        _normalize_rows(hidden, layers.attention_norm[layer], epsilon, normed)
        multiply(normed, _of_layer(layers.query_key_value, layer), asked.reshape(tokens, all_heads * head_dim))
        for token in range(tokens):
            for head in range(all_heads - kept // 2):
                if layers.query_key_norm.shape[1] > 0:
                    one = asked[token, head]
                    _normalize(one, layers.query_key_norm[layer, head], epsilon, one)
                _turn(asked[token, head], turns[token])
        pairs = past.pairs[layers.first + layer - past.first]
        keep(asked, heads, pairs, past.slots, past.ends)
        attend(asked, pairs, past.slots, past.begins, past.ends, layers.windows[layer], scale, mixed)
        multiply(mixed.reshape(tokens, heads * head_dim), _of_layer(layers.attention_output, layer), added)
        hidden += added
        _normalize_rows(hidden, layers.feed_forward_norm[layer], epsilon, normed)
        multiply(normed, _of_layer(layers.gate_up, layer), both)
        for token in range(tokens):
            for place in range(inner):
                gate = both[token, place]
                gated[token, place] = gate / (np.float32(1) + exponential(-gate)) * both[token, inner + place]
        multiply(gated, _of_layer(layers.down, layer), added)
        hidden += added


@compiled(inline="always")
def _of_layer(matrices: Matrix, layer: int) -> Matrix:
    return Matrix(matrices.weight[layer], matrices.scales[layer], matrices.bias[layer])


@compiled()
def _normalize(values: Floats, gains: Floats, epsilon: float, normed: Floats) -> None:
    """Divides by the root mean square; `normed` may be `values`."""
    total = np.float32(0)
    for value in values:
        total += value * value
    inverse = np.float32(1) / np.sqrt(total / np.float32(values.size) + np.float32(epsilon))
    for place in range(values.size):
        normed[place] = values[place] * inverse * gains[place]


@compiled()
def _normalize_rows(rows: Floats, gains: Floats, epsilon: float, normed: Floats) -> None:
    for row in range(len(rows)):
        _normalize(rows[row], gains, epsilon, normed[row])


@compiled()
def _turn(head: Floats, turns: NDArray[np.complex64]) -> None:
    """Rotates neighbouring pairs, in place."""
    for pair in range(turns.size):
        real, imaginary, turn = head[2 * pair], head[2 * pair + 1], turns[pair]
        head[2 * pair] = real * turn.real - imaginary * turn.imag
        head[2 * pair + 1] = real * turn.imag + imaginary * turn.real
