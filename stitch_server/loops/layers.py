"""Whole decoder layers, one behind the other in one call that threads share. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stitch_server.loops.attention import attend, divided, keep, scratch_for, tasks_of
from stitch_server.loops.compiling import compiled
from stitch_server.loops.instructions import Instructions
from stitch_server.loops.matrix import ADD, REPLACE, Matrix
from stitch_server.loops.numbers import Floats, Places, exponential
from stitch_server.loops.panels import LANES
from stitch_server.loops.past import Past
from stitch_server.loops.products import Bench, bench_for, leave, multiply, outputs_at_once, ready
from stitch_server.loops.tasks import first_task, next_task, wait_for


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


class Room(NamedTuple):
    """What threads write for each other within a layer."""

    # [tokens, all heads * head_dim]: queries, keys and values.
    asked: Floats
    # [tokens, heads * head_dim]
    mixed: Floats
    # [tokens, inner]
    gated: Floats


class Pass(NamedTuple):
    """What goes through some layers."""

    # [tokens, hidden_size], in and out.
    hidden: Floats
    # [positions, head_dim / 2]: what queries and keys at each position are rotated by.
    turns: NDArray[np.complex64]
    past: Past
    room: Room


@compiled()
def run(
    states: Pass, layers: Layers, first: int, end: int, epsilon: float, by: Instructions, threads: int, counts: Places
) -> None:
    """A pass through layers [first, end) of the whole model, by up to so many threads, all with the same arguments.

    Whoever calls it returns when all is done. Products are taken `by` what the processor has.
    """
    hidden, past, room = states.hidden, states.past, states.room
    tokens, head_dim, inner = len(hidden), past.pairs.shape[3], room.gated.shape[1]
    all_heads, heads = room.asked.shape[1] // head_dim, room.mixed.shape[1] // head_dim
    asked = room.asked.reshape(tokens, all_heads, head_dim)
    mixed = room.mixed.reshape(tokens, heads, head_dim)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    division, scratch = divided(past, heads, threads, by.tiles), scratch_for(past, heads, head_dim)
    heads_at_once = _heads_at_once(head_dim)
    gates = outputs_at_once(hidden.shape[1])
    normed = np.empty_like(hidden)
    both = np.empty((tokens, 2 * gates), np.float32)
    widest = max(hidden.shape[1], room.mixed.shape[1], inner)
    bench = bench_for(tokens, widest, layers.down.weight[0], by, threads)
    task, done = first_task(counts), 0
    for layer in range(first - layers.first, end - layers.first):
        pairs = past.pairs[layers.first + layer - past.first]
        behind = done + -(-all_heads // heads_at_once)
        if task < behind:
            wait_for(counts, done)
            _normalize_rows(hidden, layers.attention_norm[layer], epsilon, normed)
            ready(normed, bench)
        while task < behind:
            first_head = (task - done) * heads_at_once
            _ask(normed, layers, layer, first_head, min(first_head + heads_at_once, all_heads), epsilon, bench, states)
            task = next_task(counts)
        done, behind = behind, behind + tasks_of(division)
        if task < behind:
            wait_for(counts, done)
        while task < behind:
            attend(task - done, division, asked, pairs, past, layers.windows[layer], scale, scratch, mixed)
            task = next_task(counts)
        done, task = _add(room.mixed, _of_layer(layers.attention_output, layer), bench, hidden, behind, task, counts)
        behind = done + -(-inner // gates)
        if task < behind:
            wait_for(counts, done)
            _normalize_rows(hidden, layers.feed_forward_norm[layer], epsilon, normed)
            ready(normed, bench)
        while task < behind:
            gate = (task - done) * gates
            _gate(normed, _of_layer(layers.gate_up, layer), gate, min(gate + gates, inner), bench, both, room.gated)
            task = next_task(counts)
        done, task = _add(room.gated, _of_layer(layers.down, layer), bench, hidden, behind, task, counts)
    leave(bench)
    wait_for(counts, done)


@compiled()
def _heads_at_once(head_dim: int) -> int:
    """So many that they begin where panels do."""
    heads = 1
    while heads * head_dim % LANES != 0:
        heads += 1
    return heads


@compiled()
def _ask(
    normed: Floats, layers: Layers, layer: int, first: int, end: int, epsilon: float, bench: Bench, states: Pass
) -> None:
    """Heads [first, end) of queries, keys and values, rotated, and in the cache where they belong there."""
    past, asked = states.past, states.room.asked
    head_dim, kept = past.pairs.shape[3], past.pairs.shape[2]
    all_heads = asked.shape[1] // head_dim
    begin = first * head_dim
    multiply(normed, _of_layer(layers.query_key_value, layer), begin, end * head_dim, bench, asked, begin, REPLACE)
    pairs = past.pairs[layers.first + layer - past.first]
    for head in range(first, end):
        for token in range(len(asked)):
            one = asked[token, head * head_dim : (head + 1) * head_dim]
            if head < all_heads - kept // 2:
                if layers.query_key_norm.shape[1] > 0:
                    _normalize(one, layers.query_key_norm[layer, head], epsilon, one)
                _turn(one, states.turns[past.ends[token] - past.begins[token] - 1])
            if head >= all_heads - kept:
                keep(one, token, head - (all_heads - kept), pairs, past)


@compiled()
def _add(
    x: Floats, matrix: Matrix, bench: Bench, hidden: Floats, done: int, task: int, counts: Places
) -> tuple[int, int]:
    """A stage that adds a product to `hidden`, behind so many tasks; how many there are then, and a later task."""
    outputs = hidden.shape[1]
    at_once = outputs_at_once(x.shape[1])
    behind = done + -(-outputs // at_once)
    if task < behind:
        wait_for(counts, done)
        ready(x, bench)
    while task < behind:
        first = (task - done) * at_once
        multiply(x, matrix, first, min(first + at_once, outputs), bench, hidden, first, ADD)
        task = next_task(counts)
    return behind, task


@compiled()
def _gate(normed: Floats, matrix: Matrix, first: int, end: int, bench: Bench, both: Floats, gated: Floats) -> None:
    """Places [first, end) of the gated network; `both` is room."""
    count, inner = end - first, gated.shape[1]
    multiply(normed, matrix, first, end, bench, both, np.int64(0), REPLACE)
    multiply(normed, matrix, inner + first, inner + end, bench, both, count, REPLACE)
    for token in range(len(normed)):
        for place in range(count):
            gate = both[token, place]
            gated[token, first + place] = gate / (np.float32(1) + exponential(-gate)) * both[token, count + place]


@compiled(inline="always")
def _of_layer(matrices: Matrix, layer: int) -> Matrix:
    return Matrix(matrices.weight[layer], matrices.scales[layer], matrices.bias[layer])


@compiled()
def _normalize(values: Floats, gains: Floats, epsilon: float, normed: Floats) -> None:
    """Divides by the root mean square; `normed` may be `values`."""
    total = np.float32(0)
    for place in range(gains.size):
        total += values[place] * values[place]
    inverse = np.float32(1) / np.sqrt(total / np.float32(gains.size) + np.float32(epsilon))
    for place in range(gains.size):
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
