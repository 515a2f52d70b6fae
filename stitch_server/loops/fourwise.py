"""Products of rows by a matrix in four bits. Knows arrays alone.

By digits a few rows are multiplied without widening a weight. Many rows share weights that are widened, a strip at a
time; their sums are then those by float32, to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.amx import SIDE
from stitch_server.loops.compiling import compiled
from stitch_server.loops.digits import DEPTH, DIGITS, Digits, split_in_digits
from stitch_server.loops.floatwise import (
    FloatBench,
    float_bench,
    leave_floats,
    put_strip,
    rows_at_once,
    split_floats,
    sum_strip,
)
from stitch_server.loops.four_dots import MOST_ROWS, PANELS, PANELS_OF_ONE, add_fours, add_fours_to_one
from stitch_server.loops.fours import widen
from stitch_server.loops.instructions import Instructions
from stitch_server.loops.matrix import Matrix
from stitch_server.loops.numbers import Floats
from stitch_server.loops.panels import LANES
from stitch_server.loops.tiled import lines
from stitch_server.loops.words import GROUP


class FourBench(NamedTuple):
    """Room for one thread's products."""

    floats: FloatBench
    # Weights of a strip, where these are widened.
    wide: Floats
    # Of all rows, where they are multiplied by digits; new ones for each number of inputs.
    digits: Digits
    # [rows]
    scales: Floats
    # Of each row's groups of inputs the sum, in whole numbers.
    totals: Floats
    # [rows, outputs] that are summed at the same time.
    sums: Floats


@compiled()
def four_bench(rows: int, inputs: int, by: Instructions, threads: int) -> FourBench:
    """For so many rows of up to so many inputs."""
    floats, split = float_bench(rows, inputs, by.tiles, threads), rows if by.dots and not by.tiles else 0
    wide = floats.sums.shape[1] * _groups(inputs) * GROUP if split == 0 else 0
    some, width = (1, PANELS_OF_ONE * LANES) if rows == 1 else (MOST_ROWS, PANELS * LANES)
    return FourBench(
        floats,
        lines(4 * wide).view(np.float32),
        lines(_tiles(split) * -(-inputs // DEPTH) * SIDE * DEPTH).view(np.int8),
        np.empty(split, np.float32),
        np.empty(split * _groups(inputs), np.float32),
        lines(4 * some * width).view(np.float32).reshape(some, width),
    )


@compiled()
def leave_fours(bench: FourBench) -> None:
    """Behind a thread's last product."""
    leave_floats(bench.floats)


@compiled()
def split_fours(x: Floats, bench: FourBench) -> None:
    """Has to be called before `multiply_by_fours` is, and again when `x` has changed."""
    if bench.digits.size == 0:
        split_floats(x, bench.floats)
        return
    rows, inputs = x.shape
    digits, totals = _digits(bench, rows, inputs), _totals(bench, rows, inputs)
    split_in_digits(x, digits, bench.scales)
    for row in range(rows):
        for group in range(_groups(inputs)):
            totals[row, group] = _total(digits, DIGITS * row, group)


@compiled(forceinline=True)
def multiply_by_fours(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    bench: FourBench,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """As `products.multiply` does."""
    if bench.digits.size == 0:
        _multiply_widened(x, matrix, first, end, bench, result, place, added)
        return
    digits, totals = _digits(bench, len(x), x.shape[1]), _totals(bench, len(x), x.shape[1])
    at_once, width = bench.sums.shape
    for output in range(first, end, width):
        later = output + width if output + width < end else first + bench.floats.threads * (end - first)
        panel, ahead, count = output // LANES, later // LANES, min(width, end - output)
        for top in range(0, len(x), at_once):
            rows = min(at_once, len(x) - top)
            if at_once == 1:
                add_fours_to_one(matrix.weight, panel, ahead, digits, totals, top, rows, bench.sums)
            else:
                add_fours(matrix.weight, panel, ahead, digits, totals, top, rows, bench.sums)
            for row in range(rows):
                for number in range(width):
                    bench.sums[row, number] *= bench.scales[top + row]
            put_strip(bench.sums, rows, matrix, output, count, result, top, place + output - first, added)


@compiled()
def _multiply_widened(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    bench: FourBench,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    floats = bench.floats
    width, at_once = floats.sums.shape[1], rows_at_once(len(x), x.shape[1], floats)
    panels, filled = width // LANES, _groups(x.shape[1]) * GROUP
    wide = bench.wide[: width * filled].reshape(panels, filled, LANES)
    for output in range(first, end, width):
        later = output + width if output + width < end else first + floats.threads * (end - first)
        widen(matrix.weight, output // LANES, later // LANES, wide)
        count = min(width, end - output)
        for top in range(0, len(x), at_once):
            rows = min(at_once, len(x) - top)
            sum_strip(x, top, rows, wide, 0, panels, floats)
            put_strip(floats.sums, rows, matrix, output, count, result, top, place + output - first, added)


@compiled()
def _total(digits: Digits, line: int, group: int) -> np.int32:
    """The sum of a group's whole numbers, whose lowest digits are in this line of all."""
    begin, total = group * GROUP % DEPTH, np.int32(0)
    for digit in range(DIGITS - 1, -1, -1):
        tile, within = divmod(line + digit, SIDE)
        some = np.int32(0)
        for one in digits[tile, group * GROUP // DEPTH, within, begin : begin + GROUP]:
            some += np.int32(one)
        total = np.int32(256) * total + some
    return total


@compiled()
def _tiles(rows: int) -> int:
    """Of the lines of all digits."""
    return -(-DIGITS * rows // SIDE)


@compiled(forceinline=True)
def _digits(bench: FourBench, rows: int, inputs: int) -> Digits:
    """Where those of such rows lie."""
    tiles, deep = _tiles(rows), -(-inputs // DEPTH)
    return bench.digits[: tiles * deep * SIDE * DEPTH].reshape(tiles, deep, SIDE, DEPTH)


@compiled(forceinline=True)
def _totals(bench: FourBench, rows: int, inputs: int) -> Floats:
    return bench.totals[: rows * _groups(inputs)].reshape(rows, _groups(inputs))


@compiled()
def _groups(inputs: int) -> int:
    """The last one may have room for more inputs."""
    return -(-inputs // GROUP)
