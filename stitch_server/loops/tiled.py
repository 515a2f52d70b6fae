"""Sums of products in tiles: strips of a matrix in parts, one behind the other, by rows in parts. Knows arrays alone.

All rows are split once, and a strip of weights whenever its turn comes: in memory there are the numbers themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stitch_server.loops.amx import SIDE, TILES
from stitch_server.loops.amx_halves import multiply_tiles, split_and_multiply_tiles
from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers
from stitch_server.loops.parts import DEPTH, PARTS, Halves, Pairs, split_rows, split_weights
from stitch_server.loops.vectors import CACHE_LINE

# Outputs of a strip.
WIDTH = TILES * SIDE
# Tiles of inputs whose products are summed before their sum is added to others', which is more exact than one sum for
# all of them; there is room for a strip of so many in the second cache, too.
DEEP_AT_ONCE = 18
# A power of two above that.
ALL = 32
# Numbers of rows that have room there beside it.
ROOM_FOR_ROWS = 2**18


class Split(NamedTuple):
    """One thread's room for parts; nothing where no tiles multiply."""

    rows: Halves
    weights: Pairs
    # [TILES * SIDE, WIDTH]
    sums: Floats


@compiled()
def split_for(rows: int, inputs: int, in_tiles: bool) -> Split:
    """Room for so many rows of up to so many inputs, and for a strip of weights."""
    numbers = _numbers(rows, inputs) if in_tiles else 0
    shape = (TILES, DEEP_AT_ONCE if in_tiles else 0, PARTS, SIDE, SIDE)
    weights = shape[0] * shape[1] * shape[2] * SIDE * SIDE
    sums = TILES * SIDE if in_tiles else 0
    return Split(
        lines(2 * PARTS * numbers).view(np.uint16),
        lines(4 * weights).view(np.uint32).reshape(shape),
        lines(4 * sums * WIDTH).view(np.float32).reshape(sums, WIDTH),
    )


@compiled()
def lines(size: int) -> NDArray[np.uint8]:
    """So many bytes from the beginning of a cache line on: tiles are loaded four times as fast as over two of them."""
    room = np.empty(size + CACHE_LINE, np.uint8)
    skipped = -room.ctypes.data % CACHE_LINE
    return room[skipped : skipped + size]


@compiled()
def split(x: Floats, room: Split) -> None:
    """Makes `room` hold these rows."""
    split_rows(x, _rows(room, len(x), x.shape[1]))


@compiled()
def sum_in_tiles(
    x: Floats, top: int, rows: int, weight: Numbers, panel: int, ahead: int, room: Split, sums: Floats
) -> None:
    """sums[r, o] = Σ weight[panel: o, k] · x[top + r, k] for rows that were `split`, of which `top` begins a tile.

    Weights are those of a strip, and `sums` `[rows in whole tiles, WIDTH]`. Weights of the strip from panel `ahead` on
    come to the second cache meanwhile, if there is one.
    """
    parts = _rows(room, len(x), x.shape[1])
    first, tiles, deep = top // SIDE, -(-rows // SIDE), parts.shape[1]
    steps = -(-deep // DEEP_AT_ONCE)
    # Of a panel, which each tile of rows fetches a share of.
    line_inputs = CACHE_LINE // (SIDE * weight.itemsize)
    share = -(-DEPTH // (line_inputs * -(-tiles // TILES)))
    for step in range(steps):
        begin, after = step * deep // steps, (step + 1) * deep // steps
        count, whole = after - begin, min(after, weight.shape[1] // DEPTH) - begin
        for number in range(TILES):
            source = weight[min(panel + number, len(weight) - 1)]
            split_weights(source, (begin + whole) * DEPTH, room.weights[number, whole:count])
        later, place = (panel, after * DEPTH) if step + 1 < steps else (ahead, 0)
        # Few rows take less time than fetching a strip does: what they split they fetch themselves.
        fetched = share if later + TILES <= len(weight) and tiles > TILES else 0
        # Used once, parts of two tiles of inputs have room in the first cache.
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
                    fetched,
                    panel,
                    whole,
                    kept,
                )
            else:
                multiply_tiles(parts, at, here, begin, room.weights, count, fresh, weight, later, place, fetched)
            place += fetched * count * line_inputs
            if step > 0:
                _add(room.sums, target)


@compiled()
def _add(more: Floats, sums: Floats) -> None:
    for row in range(len(sums)):
        for number in range(WIDTH):
            sums[row, number] += more[row, number]


@compiled()
def _rows(room: Split, rows: int, inputs: int) -> Halves:
    """Where parts of these rows lie."""
    count, deep = PARTS * _numbers(rows, inputs), -(-inputs // DEPTH)
    return room.rows[:count].reshape(-(-rows // SIDE), deep, PARTS, SIDE, DEPTH)


@compiled()
def _numbers(rows: int, inputs: int) -> int:
    """Those of so many rows in whole tiles."""
    return -(-rows // SIDE) * SIDE * -(-inputs // DEPTH) * DEPTH
