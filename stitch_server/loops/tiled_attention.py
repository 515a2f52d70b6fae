"""Attention of consecutive tokens of one sequence, in tiles of bfloat16. Knows arrays alone.

As in `together.py` the past goes by part by part. Here keys are rows and queries what they are multiplied by, then
values are rows and shares what they are multiplied by, all in parts (`parts.py`). So a query is a lane of a vector from
its scores to its mean: a softmax of sixteen queries folds nothing, and its shares lie as tiles want them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.amx import SIDE, TILES
from stitch_server.loops.amx_halves import multiply_tiles
from stitch_server.loops.columns import Bounds, hide, soften, turn
from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers, Places
from stitch_server.loops.parts import DEPTH, PARTS, Halves, Pairs, split_line, split_weights
from stitch_server.loops.tiled import lines
from stitch_server.loops.together import PART, fetch

# With fewer for the same keys tiles take longer than vectors.
FEWEST_QUERIES = 16
# That go together, of all threads: keys and values are split once for these.
MOST_QUERIES_IN_TILES = 384
# Queries of a strip.
WIDTH = TILES * SIDE


class Strips(NamedTuple):
    """Queries of one head of keys, WIDTH in a strip."""

    # In parts: [panels, tiles of inputs, PARTS, SIDE, SIDE]
    asked: Pairs
    # The largest score so far, the sum of all shares, and what the latest largest one makes of older shares.
    tops: Floats
    totals: Floats
    corrections: Floats
    # [strips, head_dim, WIDTH]: sums of values by their shares.
    sums: Floats


class Part(NamedTuple):
    """Tokens of the past."""

    # In parts: [tiles of tokens, tiles of inputs, PARTS, SIDE, DEPTH]
    keys: Halves
    # In parts: [tiles of dimensions, tiles of tokens, PARTS, SIDE, SIDE]
    values: Pairs
    # [PART, WIDTH]
    scores: Floats
    # In parts: [TILES, tiles of tokens, PARTS, SIDE, SIDE]
    shares: Pairs
    # [WIDTH, WIDTH]
    answered: Floats


@compiled()
def attend_in_tiles(
    query: Floats,
    pairs: Numbers,
    seen: Places,
    lengths: Places,
    first: int,
    end: int,
    window: int,
    scale: float,
    mixed: Floats,
) -> None:
    """As `together.attend_together`, for heads of whole tiles."""
    kv_heads, head_dim = pairs.shape[1] // 2, mixed.shape[2]
    group, all_heads = mixed.shape[1] // kv_heads, query.shape[1]
    count = len(mixed) * group
    filled = -(-count // WIDTH) * WIDTH
    strips, part = _strips(filled, head_dim), _part(head_dim)
    # By query: its row, and which tokens it sees. What fills a strip up is the last one again.
    rows, lows, highs = np.empty(filled, np.int64), np.empty(filled, np.int32), np.empty(filled, np.int32)
    for one in range(filled):
        token = min(one, count - 1) // group
        highs[one] = lengths[token]
        lows[one] = max(0, lengths[token] - window) if window > 0 else 0
    turned = np.empty((head_dim, SIDE), np.float32)
    asked = query.reshape(len(query) * all_heads, head_dim)
    for kv_head in range(first, end):
        for one in range(filled):
            token, head = divmod(min(one, count - 1), group)
            rows[one] = token * all_heads + kv_head * group + head
        _begin(asked, rows, scale, turned, strips)
        for begin in range(0, seen.size, PART):
            slots, later = seen[begin : begin + PART], seen[begin + PART : begin + 2 * PART]
            fetch(pairs[:, kv_head], later)
            fetch(pairs[:, kv_heads + kv_head], later)
            _split_keys(pairs[:, kv_head], slots, part.keys)
            _split_values(pairs[:, kv_heads + kv_head], slots, turned, part.values)
            for strip in range(filled // WIDTH):
                last = strip * WIDTH + WIDTH - 1
                tokens = min(slots.size, highs[last] - begin)
                if tokens > 0 and lows[strip * WIDTH] < begin + tokens:
                    _attend(strip, begin, tokens, lows, highs, strips, part)
        _end(strips, count, group, kv_head, turned, mixed)


@compiled()
def _strips(queries: int, head_dim: int) -> Strips:
    asked = lines(2 * PARTS * queries * head_dim).view(np.uint32)
    return Strips(
        asked.reshape(queries // SIDE, head_dim // DEPTH, PARTS, SIDE, SIDE),
        np.empty(queries, np.float32),
        np.empty(queries, np.float32),
        np.empty(queries, np.float32),
        lines(4 * queries * head_dim).view(np.float32).reshape(queries // WIDTH, head_dim, WIDTH),
    )


@compiled()
def _part(head_dim: int) -> Part:
    tokens, dimensions = PART // SIDE, head_dim // SIDE
    size = 2 * PARTS * PART * head_dim
    return Part(
        lines(size).view(np.uint16).reshape(tokens, head_dim // DEPTH, PARTS, SIDE, DEPTH),
        lines(size).view(np.uint32).reshape(dimensions, PART // DEPTH, PARTS, SIDE, SIDE),
        lines(4 * PART * WIDTH).view(np.float32).reshape(PART, WIDTH),
        lines(2 * PARTS * PART * WIDTH).view(np.uint32).reshape(TILES, PART // DEPTH, PARTS, SIDE, SIDE),
        lines(4 * WIDTH * WIDTH).view(np.float32).reshape(WIDTH, WIDTH),
    )


@compiled()
def _begin(asked: Floats, rows: Places, scale: float, turned: Floats, strips: Strips) -> None:
    """The queries that lie in these rows, before anything is seen."""
    for panel in range(len(strips.asked)):
        for place in range(0, len(turned), SIDE):
            turn(asked, rows, panel * SIDE, place, turned, place)
        for dimension in range(len(turned)):
            for number in range(SIDE):
                turned[dimension, number] *= np.float32(scale)
        split_weights(turned, 0, strips.asked[panel])
    strips.tops[:] = -np.inf
    strips.totals[:] = 0
    strips.sums[:] = 0


@compiled()
def _split_keys(keys: Numbers, slots: Places, parts: Halves) -> None:
    """The last one again for what fills a tile up, which nobody sees."""
    for place in range(-(-slots.size // DEPTH) * DEPTH):
        slot = slots[min(place, slots.size - 1)]
        for deep in range(parts.shape[1]):
            split_line(keys, slot, deep * DEPTH, parts, place // SIDE, deep, place % SIDE)


@compiled()
def _split_values(values: Numbers, slots: Places, turned: Floats, parts: Pairs) -> None:
    """Turned: a row for each dimension."""
    for begin in range(0, slots.size, DEPTH):
        for tile in range(len(parts)):
            turn(values, slots, begin, tile * SIDE, turned, 0)
            turn(values, slots, begin + SIDE, tile * SIDE, turned, SIDE)
            split_weights(turned[:DEPTH], 0, parts[tile, begin // DEPTH : begin // DEPTH + 1])


@compiled()
def _attend(strip: int, begin: int, tokens: int, lows: Bounds, highs: Bounds, strips: Strips, part: Part) -> None:
    """What a strip of queries adds up of a part of so many tokens from `begin` on."""
    first, steps = strip * WIDTH, -(-tokens // DEPTH)
    asked = strips.asked[strip * TILES : (strip + 1) * TILES]
    for step in range(steps):
        scores = part.scores[step * DEPTH : (step + 1) * DEPTH]
        multiply_tiles(part.keys, step * TILES, TILES, 0, asked, asked.shape[1], scores, scores, 0, 0, 0)
    # Lengths grow from query to query, and the last one's fill the strip up.
    unseen = 0 if lows[first + WIDTH - 1] > begin else max(0, highs[first] - begin)
    for panel in range(TILES):
        one = first + panel * SIDE
        if unseen < steps * DEPTH:
            hide(part.scores, unseen, steps * DEPTH, panel * SIDE, begin, lows, highs, one)
        soften(
            part.scores,
            steps,
            panel * SIDE,
            strips.tops,
            strips.totals,
            strips.corrections,
            one,
            part.shares[panel],
        )
    for dimension in range(0, strips.sums.shape[1], WIDTH):
        answered = part.answered
        multiply_tiles(part.values, dimension // SIDE, TILES, 0, part.shares, steps, answered, answered, 0, 0, 0)
        for row in range(WIDTH):
            sums = strips.sums[strip, dimension + row]
            for number in range(WIDTH):
                sums[number] = sums[number] * strips.corrections[first + number] + answered[row, number]


@compiled()
def _end(strips: Strips, count: int, group: int, kv_head: int, turned: Floats, mixed: Floats) -> None:
    """Means of what the queries saw."""
    dimensions = np.arange(len(turned))
    for first in range(0, count, SIDE):
        sums, column = strips.sums[first // WIDTH], first % WIDTH
        for place in range(0, len(turned), SIDE):
            turn(sums, dimensions, place, column, turned, 0)
            for one in range(first, min(first + SIDE, count)):
                token, head = divmod(one, group)
                for number in range(SIDE):
                    mean = turned[one - first, number] / strips.totals[one]
                    mixed[token, kv_head * group + head, place + number] = mean
