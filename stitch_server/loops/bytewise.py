"""Products of rows by a matrix of bytes, in tiles. Knows arrays alone.

A row has the same outputs, to the last bit, in any company: nothing is rounded before all is summed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.amx import SIDE, TILES, open_tiles
from stitch_server.loops.amx_bytes import PANELS_OF_FEW, multiply_bytes
from stitch_server.loops.compiling import compiled
from stitch_server.loops.digits import DEPTH, DIGITS, Digits, Quads, Wholes, split_in_digits
from stitch_server.loops.matrix import Matrix
from stitch_server.loops.numbers import Floats
from stitch_server.loops.tiled import lines

# Digits that have room in the second cache beside weights.
ROOM_FOR_DIGITS = 2**20
# Rows whose lines fill pairs of tiles.
ROWS_OF_PAIRS = TILES * SIDE


class ByteBench(NamedTuple):
    """Room for one thread's products by bytes."""

    # Of all rows, a new one for each number of inputs.
    digits: Digits
    # [rows]
    scales: Floats
    # [lines in whole tiles, outputs of as many panels as are multiplied at the same time]
    sums: Wholes
    # How many share the tasks.
    threads: int


@compiled()
def byte_bench(rows: int, inputs: int, threads: int) -> ByteBench:
    """For so many rows of up to so many inputs."""
    tiles = _tiles(rows)
    panels = PANELS_OF_FEW if tiles == 1 else TILES
    open_tiles()
    return ByteBench(
        lines(tiles * SIDE * -(-inputs // DEPTH) * DEPTH).view(np.int8),
        np.empty(rows, np.float32),
        lines(4 * tiles * SIDE * panels * SIDE).view(np.int32).reshape(tiles * SIDE, panels * SIDE),
        threads,
    )


@compiled()
def split_bytes(x: Floats, bench: ByteBench) -> None:
    """Has to be called before `multiply_by_bytes` is, and again when `x` has changed."""
    split_in_digits(x, _digits(bench, len(x), x.shape[1]), bench.scales)


@compiled(forceinline=True)
def multiply_by_bytes(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    bench: ByteBench,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """As `products.multiply` does."""
    at_once = max(1, ROOM_FOR_DIGITS // (DIGITS * x.shape[1] * ROWS_OF_PAIRS)) * ROWS_OF_PAIRS
    width = bench.sums.shape[1]
    for top in range(0, len(x), at_once):
        rows = min(at_once, len(x) - top)
        for output in range(first, end, width):
            later = output + width if output + width < end else first + bench.threads * (end - first)
            _sum(x, top, rows, matrix.weight, output, later, bench)
            count = min(width, end - output)
            _put(bench, top, rows, matrix, output, count, result, place + output - first, added)


@compiled(forceinline=True)
def _sum(x: Floats, top: int, rows: int, weight: Quads, output: int, later: int, bench: ByteBench) -> None:
    """Sums of the lines of so many rows for a strip, to the beginning of the bench's; `top` begins a pair of tiles.

    Weights of the strip from output `later` on come to the second cache meanwhile.
    """
    digits, first = _digits(bench, len(x), x.shape[1]), DIGITS * top // SIDE
    at_once = min(len(digits), TILES)
    tiles = -(-DIGITS * rows // (SIDE * at_once)) * at_once
    # Of a tile of weights to come, which each step fetches a share of.
    share = -(-SIDE * at_once // tiles)
    for tile in range(0, tiles, at_once):
        sums, line = bench.sums[tile * SIDE :], tile // at_once * share
        fetched = max(0, min(share, SIDE - line))
        multiply_bytes(digits, first + tile, at_once, weight, output // SIDE, sums, later // SIDE, line, fetched)


@compiled(forceinline=True)
def _put(
    bench: ByteBench,
    top: int,
    rows: int,
    matrix: Matrix,
    output: int,
    count: int,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """Rows of a strip's outputs to where they belong."""
    scales, bias = matrix.scales[output : output + count], matrix.bias[output : output + count]
    for row in range(rows):
        target, scale = result[top + row, place : place + count], bench.scales[top + row]
        low, middle, high = bench.sums[DIGITS * row], bench.sums[DIGITS * row + 1], bench.sums[DIGITS * row + 2]
        for number in range(count):
            whole = np.float32(low[number]) + np.float32(256) * np.float32(middle[number])
            whole += np.float32(65536) * np.float32(high[number])
            product = whole * (scale * scales[number]) + bias[number]
            target[number] = target[number] + product if added else product


@compiled()
def _tiles(rows: int) -> int:
    """Of all lines; of several a whole number of pairs."""
    tiles = -(-DIGITS * rows // SIDE)
    return tiles if tiles <= 1 else -(-tiles // TILES) * TILES


@compiled(forceinline=True)
def _digits(bench: ByteBench, rows: int, inputs: int) -> Digits:
    """Where those of such rows lie."""
    tiles, deep = _tiles(rows), -(-inputs // DEPTH)
    return bench.digits[: tiles * deep * SIDE * DEPTH].reshape(tiles, deep, SIDE, DEPTH)
