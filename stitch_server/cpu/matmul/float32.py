"""Matmuls by float32 and bfloat16 weights, in vector registers or in AMX tiles.

Many rows are divided into blocks, and the inputs of a block into pieces, so that what is read again comes from a cache.
For tiles both operands are split into three bfloat16 each (`bf16x3.py`): rows once, weights strip by strip when they
are multiplied, so that memory holds and delivers plain float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.bf16x3 import (
    BF16_TILE_INPUTS,
    TERMS,
    Bf16,
    Bf16Pairs,
    matmul_tiles,
    split_and_matmul_tiles,
    split_rows,
    split_weights,
)
from stitch_server.cpu.matmul.panels import (
    FEW_ROWS,
    FEW_ROWS_PANELS,
    MAX_ROWS,
    PANEL_OUTPUTS,
    PANELS,
    Matrix,
    fma_panels,
    fma_panels_few,
)
from stitch_server.cpu.scalars import Floats, Numbers
from stitch_server.cpu.simd import BLOCK_TILES, CACHE_LINE, TILE_SIDE, cache_aligned, configure_tiles, release_tiles

# Outputs of a strip of weights.
STRIP_OUTPUTS = BLOCK_TILES * TILE_SIDE
# Tiles of inputs of one accumulation. Adding up partial sums is more exact than one long sum, and a strip of this many
# tiles fits into the L2 cache.
BLOCK_K_TILES = 18
# Tiles in the ring of split weights where none is overwritten: a power of two, at least BLOCK_K_TILES.
WHOLE_RING = 32
# Elements of rows that fit into the L2 cache beside the strip.
L2_SPLIT_ELEMENTS = 2**18


class SplitBuffers(NamedTuple):
    """One thread's buffers for split operands; empty where vectors multiply."""

    rows: Bf16
    weights: Bf16Pairs
    # [BLOCK_TILES * TILE_SIDE, STRIP_OUTPUTS]
    sums: Floats


@compiled()
def new_split_buffers(rows: int, inputs: int, use_amx: bool) -> SplitBuffers:
    """Allocates buffers for `rows` rows of up to `inputs` inputs, and for a strip of weights."""
    numbers = _padded_elements(rows, inputs) if use_amx else 0
    shape = (BLOCK_TILES, BLOCK_K_TILES if use_amx else 0, TERMS, TILE_SIDE, TILE_SIDE)
    weights = shape[0] * shape[1] * shape[2] * TILE_SIDE * TILE_SIDE
    sums = BLOCK_TILES * TILE_SIDE if use_amx else 0
    return SplitBuffers(
        cache_aligned(2 * TERMS * numbers).view(np.uint16),
        cache_aligned(4 * weights).view(np.uint32).reshape(shape),
        cache_aligned(4 * sums * STRIP_OUTPUTS).view(np.float32).reshape(sums, STRIP_OUTPUTS),
    )


@compiled()
def split(x: Floats, buffers: SplitBuffers) -> None:
    """Splits the rows of `x` into `buffers`."""
    split_rows(x, _split_view(buffers, len(x), x.shape[1]))


@compiled()
def matmul_strip_amx(
    x: Floats, top: int, rows: int, weight: Numbers, panel: int, next_panel: int, buffers: SplitBuffers, sums: Floats
) -> None:
    """sums[r, o] = Σ weight[panel: o, k] · x[top + r, k] for the strip of weights that begins at `panel`.

    `x` was passed to `split`, `top` begins a tile, and `sums` is `[rows in whole tiles, STRIP_OUTPUTS]`. The strip that
    begins at `next_panel`, if any, is prefetched meanwhile.
    """
    terms = _split_view(buffers, len(x), x.shape[1])
    first, tiles, k_tiles = top // TILE_SIDE, -(-rows // TILE_SIDE), terms.shape[1]
    steps = -(-k_tiles // BLOCK_K_TILES)
    # Each tile of rows prefetches its share of the next strip.
    line_inputs = CACHE_LINE // (TILE_SIDE * weight.itemsize)
    share = -(-BF16_TILE_INPUTS // (line_inputs * -(-tiles // BLOCK_TILES)))
    for step in range(steps):
        begin, block_end = step * k_tiles // steps, (step + 1) * k_tiles // steps
        depth, full_tiles = block_end - begin, min(block_end, weight.shape[1] // BF16_TILE_INPUTS) - begin
        for number in range(BLOCK_TILES):
            source = weight[min(panel + number, len(weight) - 1)]
            split_weights(source, (begin + full_tiles) * BF16_TILE_INPUTS, buffers.weights[number, full_tiles:depth])
        fetched, column = (panel, block_end * BF16_TILE_INPUTS) if step + 1 < steps else (next_panel, 0)
        # A few rows are done sooner than a prefetch of the next strip: splitting prefetches its own input.
        prefetched = share if fetched + BLOCK_TILES <= len(weight) and tiles > BLOCK_TILES else 0
        # Where split weights are used once, a ring of two tiles of inputs stays in the L1 cache.
        ring_tiles = 2 if tiles <= BLOCK_TILES and full_tiles == depth else WHOLE_RING
        for tile in range(0, tiles, BLOCK_TILES):
            height = min(BLOCK_TILES, tiles - tile)
            target = sums[tile * TILE_SIDE : (tile + height) * TILE_SIDE]
            product = target if step == 0 else buffers.sums
            row_tile = first + tile
            if tile == 0 and full_tiles > 0:
                split_and_matmul_tiles(
                    terms,
                    row_tile,
                    height,
                    begin,
                    buffers.weights,
                    depth,
                    product,
                    weight,
                    fetched,
                    column,
                    prefetched,
                    panel,
                    full_tiles,
                    ring_tiles,
                )
            else:
                matmul_tiles(
                    terms, row_tile, height, begin, buffers.weights, depth, product, weight, fetched, column, prefetched
                )
            column += prefetched * depth * line_inputs
            if step > 0:
                _add(buffers.sums, target)


@compiled()
def _add(more: Floats, sums: Floats) -> None:
    for row in range(len(sums)):
        for number in range(STRIP_OUTPUTS):
            sums[row, number] += more[row, number]


@compiled()
def _split_view(buffers: SplitBuffers, rows: int, inputs: int) -> Bf16:
    """Returns the buffer of split rows, shaped for these sizes."""
    count, k_tiles = TERMS * _padded_elements(rows, inputs), -(-inputs // BF16_TILE_INPUTS)
    return buffers.rows[:count].reshape(-(-rows // TILE_SIDE), k_tiles, TERMS, TILE_SIDE, BF16_TILE_INPUTS)


@compiled()
def _padded_elements(rows: int, inputs: int) -> int:
    """Returns the elements of these rows, padded to whole tiles."""
    return -(-rows // TILE_SIDE) * TILE_SIDE * -(-inputs // BF16_TILE_INPUTS) * BF16_TILE_INPUTS


# Inputs for which two panels fit into the L1 cache.
BLOCK_INPUTS = 192
# Elements of rows that fit into the L2 cache beside them, and the most rows of a block.
L2_VECTOR_ELEMENTS = 2**17
MAX_BLOCK_ROWS = 20 * MAX_ROWS


class FloatWorkspace(NamedTuple):
    """One thread's buffers."""

    # [rows, outputs]
    sums: Floats
    split: SplitBuffers
    # The threads that share the tasks: this thread's next task is likely to be this many tasks further on.
    threads: int


@compiled()
def new_float_workspace(rows: int, inputs: int, use_amx: bool, threads: int) -> FloatWorkspace:
    """Allocates buffers for `rows` rows of up to `inputs` inputs."""
    count, width = min(MAX_BLOCK_ROWS, rows), PANELS * PANEL_OUTPUTS
    if use_amx:
        configure_tiles()
        count, width = -(-rows // TILE_SIDE) * TILE_SIDE, STRIP_OUTPUTS
    elif rows <= FEW_ROWS:
        count, width = FEW_ROWS, FEW_ROWS_PANELS * PANEL_OUTPUTS
    sums = cache_aligned(4 * count * width).view(np.float32).reshape(count, width)
    return FloatWorkspace(sums, new_split_buffers(rows, inputs, use_amx), threads)


@compiled()
def release_float(workspace: FloatWorkspace) -> None:
    """See `dispatch.release_workspace`."""
    if workspace.split.rows.size > 0:
        release_tiles()


@compiled()
def prepare_float(x: Floats, workspace: FloatWorkspace) -> None:
    """See `dispatch.prepare_input`."""
    if workspace.split.rows.size > 0:
        split(x, workspace.split)


@compiled(forceinline=True)
def matmul_float(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: FloatWorkspace,
    result: Floats,
    column: int | np.int64,
    accumulate: np.bool_,
) -> None:
    """See `dispatch.matmul`."""
    width, at_once = workspace.sums.shape[1], block_rows(len(x), x.shape[1], workspace)
    for top in range(0, len(x), at_once):
        rows = min(at_once, len(x) - top)
        for output in range(first, end, width):
            next_output = output + width if output + width < end else first + workspace.threads * (end - first)
            matmul_strip(x, top, rows, matrix.weight, output // PANEL_OUTPUTS, next_output // PANEL_OUTPUTS, workspace)
            count = min(width, end - output)
            write_strip(workspace.sums, rows, matrix, output, count, result, top, column + output - first, accumulate)


@compiled(forceinline=True)
def matmul_strip(
    x: Floats, top: int, rows: int, weight: Numbers, panel: int, next_panel: int, workspace: FloatWorkspace
) -> None:
    """Multiplies `rows` rows from `top` on by the panels from `panel` on that the workspace has sums for.

    Panels may have more inputs than rows. In tiles the panels from `next_panel` on, if any, are prefetched meanwhile.
    """
    if workspace.split.rows.size > 0:
        matmul_strip_amx(x, top, rows, weight, panel, next_panel, workspace.split, workspace.sums)
    elif len(x) <= FEW_ROWS:
        fma_panels_few(weight, panel, x, 0, rows, 0, x.shape[1], workspace.sums)
    else:
        _matmul_strip_vectors(x, top, rows, weight, panel, workspace.sums)


@compiled()
def block_rows(rows: int, inputs: int, workspace: FloatWorkspace) -> int:
    """Returns the rows of a block: as many as fit into a cache, in about equal blocks."""
    unit, buffers = (TILE_SIDE, L2_SPLIT_ELEMENTS) if workspace.split.rows.size > 0 else (MAX_ROWS, L2_VECTOR_ELEMENTS)
    limit = min(len(workspace.sums), max(1, buffers // (unit * inputs)) * unit)
    blocks = max(1, -(-rows // limit))
    return max(1, -(-rows // (blocks * unit))) * unit


@compiled()
def _matmul_strip_vectors(x: Floats, top: int, rows: int, weight: Numbers, panel: int, sums: Floats) -> None:
    inputs, groups = x.shape[1], -(-rows // MAX_ROWS)
    # A single group of rows reads every weight once, so none need stay in a cache.
    at_once = BLOCK_INPUTS if groups > 1 else inputs
    for begin in range(0, inputs, at_once):
        block_end = min(begin + at_once, inputs)
        for group in range(groups):
            row, row_end = group * rows // groups, (group + 1) * rows // groups
            fma_panels(weight, panel, x, top + row, row_end - row, begin, block_end, sums[row:])


@compiled(forceinline=True)
def write_strip(
    sums: Floats,
    rows: int,
    matrix: Matrix,
    output: int,
    count: int,
    result: Floats,
    top: int,
    column: int | np.int64,
    accumulate: np.bool_,
) -> None:
    """Scales sums, adds the bias, and writes or adds them to `result`."""
    scales, bias = matrix.scales[output : output + count], matrix.bias[output : output + count]
    for row in range(rows):
        target = result[top + row, column : column + count]
        if accumulate:
            for number in range(count):
                target[number] += sums[row, number] * scales[number] + bias[number]
        else:
            for number in range(count):
                target[number] = sums[row, number] * scales[number] + bias[number]
