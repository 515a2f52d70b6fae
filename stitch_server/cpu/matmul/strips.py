"""Float32 products in AMX tiles: rows and weights are split into three bfloat16 each. Knows arrays alone.

Rows are split once, weights strip by strip when they are multiplied, so memory holds and delivers plain float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.amx import SIDE, TILES
from stitch_server.cpu.buffers import cache_aligned
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.amx_bf16 import multiply_tiles, split_and_multiply_tiles
from stitch_server.cpu.matmul.bf16x3 import DEPTH, PARTS, Bf16, Bf16Pairs, split_rows, split_weights
from stitch_server.cpu.scalars import Floats, Numbers
from stitch_server.cpu.vectors import CACHE_LINE

# Outputs of a strip of weights.
WIDTH = TILES * SIDE
# Tiles of inputs of one accumulation. Adding up partial sums is more exact than one long sum, and a strip of so many
# tiles fits into the L2 cache.
DEEP_AT_ONCE = 18
# A power of two that is no smaller.
ALL = 32
# Numbers of rows that fit there beside it.
ROOM_FOR_ROWS = 2**18


class Split(NamedTuple):
    """One thread's buffers for split numbers; empty where vectors multiply."""

    rows: Bf16
    weights: Bf16Pairs
    # [TILES * SIDE, WIDTH]
    sums: Floats


@compiled()
def split_for(rows: int, inputs: int, in_tiles: bool) -> Split:
    """Buffers for so many rows of up to so many inputs, and for a strip of weights."""
    numbers = _numbers(rows, inputs) if in_tiles else 0
    shape = (TILES, DEEP_AT_ONCE if in_tiles else 0, PARTS, SIDE, SIDE)
    weights = shape[0] * shape[1] * shape[2] * SIDE * SIDE
    sums = TILES * SIDE if in_tiles else 0
    return Split(
        cache_aligned(2 * PARTS * numbers).view(np.uint16),
        cache_aligned(4 * weights).view(np.uint32).reshape(shape),
        cache_aligned(4 * sums * WIDTH).view(np.float32).reshape(sums, WIDTH),
    )


@compiled()
def split(x: Floats, room: Split) -> None:
    """Splits these rows into `room`."""
    split_rows(x, _rows(room, len(x), x.shape[1]))


@compiled()
def sum_in_tiles(
    x: Floats, top: int, rows: int, weight: Numbers, panel: int, ahead: int, room: Split, sums: Floats
) -> None:
    """sums[r, o] = Σ weight[panel: o, k] · x[top + r, k] for the strip of weights that begins at `panel`.

    `x` was passed to `split`, `top` begins a tile, and `sums` is `[rows in whole tiles, WIDTH]`. The strip that begins
    at `ahead`, if any, is prefetched meanwhile.
    """
    parts = _rows(room, len(x), x.shape[1])
    first, tiles, deep = top // SIDE, -(-rows // SIDE), parts.shape[1]
    steps = -(-deep // DEEP_AT_ONCE)
    # Each tile of rows prefetches its share of the next strip.
    line_inputs = CACHE_LINE // (SIDE * weight.itemsize)
    share = -(-DEPTH // (line_inputs * -(-tiles // TILES)))
    for step in range(steps):
        begin, after = step * deep // steps, (step + 1) * deep // steps
        count, whole = after - begin, min(after, weight.shape[1] // DEPTH) - begin
        for number in range(TILES):
            source = weight[min(panel + number, len(weight) - 1)]
            split_weights(source, (begin + whole) * DEPTH, room.weights[number, whole:count])
        later, place = (panel, after * DEPTH) if step + 1 < steps else (ahead, 0)
        # A few rows are done sooner than a prefetch of the next strip: splitting prefetches what it reads itself.
        prefetched = share if later + TILES <= len(weight) and tiles > TILES else 0
        # Where split weights are used once, a ring of two tiles of inputs stays in the L1 cache.
        kept = 2 if tiles <= TILES and whole == count else ALL
        for tile in range(0, tiles, TILES):
            here = min(TILES, tiles - tile)
            target = sums[tile * SIDE : (tile + here) * SIDE]
            fresh = target if step == 0 else room.sums
            at = first + tile
            if tile == 0 and whole > 0:
                split_and_multiply_tiles(
                    parts,
                    at,
                    here,
                    begin,
                    room.weights,
                    count,
                    fresh,
                    weight,
                    later,
                    place,
                    prefetched,
                    panel,
                    whole,
                    kept,
                )
            else:
                multiply_tiles(parts, at, here, begin, room.weights, count, fresh, weight, later, place, prefetched)
            place += prefetched * count * line_inputs
            if step > 0:
                _add(room.sums, target)


@compiled()
def _add(more: Floats, sums: Floats) -> None:
    for row in range(len(sums)):
        for number in range(WIDTH):
            sums[row, number] += more[row, number]


@compiled()
def _rows(room: Split, rows: int, inputs: int) -> Bf16:
    """The buffer of split rows, shaped for these."""
    count, deep = PARTS * _numbers(rows, inputs), -(-inputs // DEPTH)
    return room.rows[:count].reshape(-(-rows // SIDE), deep, PARTS, SIDE, DEPTH)


@compiled()
def _numbers(rows: int, inputs: int) -> int:
    """How many numbers so many rows have, in whole tiles."""
    return -(-rows // SIDE) * SIDE * -(-inputs // DEPTH) * DEPTH
