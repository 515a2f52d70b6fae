"""Loops over single tokens, compiled by Numba for a processor: products, attention, whole layers. Knows arrays alone.

A product of a few rows is bound by reading the matrix. The plainest loop, one row of weights behind the other, reads
it at the memory's full speed on one thread, which the kernels that are made for many rows do not. Between its products
a layer does so little arithmetic that calling anything for each step of it, or even for each layer, costs more than
the step. And attention of a library wants each past in one piece, where a loop reads it in its blocks.

All of them are here, since a compiled function that is kept on disk is made anew when its own file changes, and not
when that of a function which it calls does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from stitch_server.compiling import compiled

Floats = NDArray[np.float32]
# float32, the bits of bfloat16 or, of weights alone, int8.
Numbers = NDArray[Any]
Places = NDArray[np.int64]


class Matrix(NamedTuple):
    """x → x · (weight · scale)ᵀ + bias."""

    # [outputs, inputs]
    weight: Numbers
    # [outputs], both float32
    scales: Floats
    bias: Floats


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


class Past(NamedTuple):
    """Where single new tokens of some sequences, and all before them, lie in the cache."""

    # The first of its layers in the whole model.
    first: int
    # [layers, slots, 2 * kv_heads, head_dim]: a token's keys, then its values.
    pairs: Numbers
    # Each one's past and present, one behind the other, and where each begins and the last ends.
    slots: Places
    bounds: Places


def _widened(number: Any) -> Any:
    """A number as float32; only compiled."""
    raise NotImplementedError


@overload(_widened, strict=False)
def _widened_by_kind(number: Any) -> Callable[[Any], Any]:
    if number == types.uint16:
        # A bfloat16 is the upper half of a float32.
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: np.float32(number)


def _like(number: Any, value: Any) -> Any:
    """A float32 `value` as whatever `number` is; only compiled."""
    raise NotImplementedError


@overload(_like, strict=False)
def _like_by_kind(number: Any, value: Any) -> Callable[[Any, Any], Any]:
    if number != types.uint16:
        return lambda number, value: value

    def rounded(number: Any, value: Any) -> Any:
        if np.isnan(value):
            return np.uint16(0x7FC0)
        bits = np.float32(value).view(np.uint32)
        # To the nearest, and half-way to the even one.
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


@compiled()
def multiply(x: Floats, matrix: Matrix, result: Floats) -> None:
    """`[rows, inputs]` to `[rows, outputs]`."""
    for output in range(len(matrix.weight)):
        factors = matrix.weight[output]
        for row in range(len(x)):
            values = x[row]
            total = np.float32(0)
            for place in range(factors.size):
                total += _widened(factors[place]) * values[place]
            result[row, output] = total * matrix.scales[output] + matrix.bias[output]


@compiled()
def keep(new: Floats, heads: int, pairs: Numbers, slots: Places, bounds: Places) -> None:
    """Each row's keys and values, `new[:, heads:]` `[tokens, 2 * kv_heads, head_dim]`, to the last of its slots."""
    for token in range(len(new)):
        slot = slots[bounds[token + 1] - 1]
        for head in range(pairs.shape[1]):
            for dimension in range(pairs.shape[2]):
                pairs[slot, head, dimension] = _like(pairs[slot, head, dimension], new[token, heads + head, dimension])


@compiled()
def attend(
    query: Floats, pairs: Numbers, slots: Places, bounds: Places, window: int, scale: float, mixed: Floats
) -> None:
    """What each row sees, `mixed` `[tokens, heads, head_dim]`; `query` may have more heads behind these."""
    heads, kv_heads = mixed.shape[1], pairs.shape[1] // 2
    # The query heads that share a key, so that it is read once for all of them.
    group = heads // kv_heads
    longest = 0
    for token in range(len(mixed)):
        longest = max(longest, bounds[token + 1] - bounds[token])
    if window > 0:
        longest = min(longest, window)
    weights = np.empty((group, longest), np.float32)
    for token in range(len(mixed)):
        begin, end = bounds[token], bounds[token + 1]
        if window > 0:
            begin = max(begin, end - window)
        seen = slots[begin:end]
        for kv_head in range(kv_heads):
            for place in range(seen.size):
                key = pairs[seen[place], kv_head]
                for member in range(group):
                    asked = query[token, kv_head * group + member]
                    product = np.float32(0)
                    for dimension in range(key.size):
                        product += asked[dimension] * _widened(key[dimension])
                    weights[member, place] = product * np.float32(scale)
            for member in range(group):
                _soften(weights[member, : seen.size])
                mixed[token, kv_head * group + member, :] = 0
            for place in range(seen.size):
                value = pairs[seen[place], kv_heads + kv_head]
                for member in range(group):
                    answer, weight = mixed[token, kv_head * group + member], weights[member, place]
                    for dimension in range(value.size):
                        answer[dimension] += weight * _widened(value[dimension])


@compiled()
def run(
    hidden: Floats, turns: NDArray[np.complex64], layers: Layers, first: int, end: int, past: Past, epsilon: float
) -> None:
    """Single tokens' `hidden` `[tokens, hidden_size]` through layers [first, end) of the whole model, in place.

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
        keep(asked, heads, pairs, past.slots, past.bounds)
        attend(asked, pairs, past.slots, past.bounds, layers.windows[layer], scale, mixed)
        multiply(mixed.reshape(tokens, heads * head_dim), _of_layer(layers.attention_output, layer), added)
        hidden += added
        _normalize_rows(hidden, layers.feed_forward_norm[layer], epsilon, normed)
        multiply(normed, _of_layer(layers.gate_up, layer), both)
        for token in range(tokens):
            for place in range(inner):
                gate = both[token, place]
                gated[token, place] = gate / (np.float32(1) + np.exp(-gate)) * both[token, inner + place]
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


@compiled()
def _soften(scores: Floats) -> None:
    """Softmax, in place."""
    largest = scores[0]
    for score in scores:
        largest = max(largest, score)
    total = np.float32(0)
    for place in range(scores.size):
        scores[place] = np.exp(scores[place] - largest)
        total += scores[place]
    for place in range(scores.size):
        scores[place] /= total
