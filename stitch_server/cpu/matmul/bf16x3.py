"""Float32 as a sum of three bfloat16: splits operands into the layout of AMX tiles, and multiplies such tiles.

A float32 has 24 significant bits and a bfloat16 eight, so three of these hold one exactly. A product of two numbers is
then the sum of nine products. The micro-kernel computes six of them and leaves out the three smallest, together below
2^-23 of the product, and still does four times the work of vectors. It accumulates in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.features import has_amx_instructions
from stitch_server.cpu.matmul.panels import PREFETCH_BYTES
from stitch_server.cpu.scalars import Floats, Numbers
from stitch_server.cpu.simd import (
    ACCUMULATORS,
    BLOCK_TILES,
    INT8,
    INT32,
    INT64,
    TILE_BYTES,
    TILE_ROW_BYTES,
    TILE_SIDE,
    Intrinsic,
    byte_offset,
    float_vector,
    instruct,
    load_as_float32,
    prefetch,
    row_of,
    switch_cases,
    unpack_arrays,
)

# Bits of bfloat16, and pairs of them: inputs n and n + TILE_SIDE of a tile, the first one in the lower half. Rows have
# their inputs in the same order.
Bf16 = NDArray[np.uint16]
Bf16Pairs = NDArray[np.uint32]

# Bfloat16 terms of a float32.
TERMS = 3
# Inputs of a tile: a pair for each of its rows.
BF16_TILE_INPUTS = 2 * TILE_SIDE

_BITS = ir.VectorType(INT32, TILE_SIDE)
_UPPER, _HALF, _SIXTEEN = (_BITS([number] * TILE_SIDE) for number in (0xFFFF0000, 0x8000, 16))


@compiled()
def split_rows(x: Floats, terms: Bf16) -> None:
    """Splits `[rows, inputs]` into `[tiles of rows, tiles of inputs, TERMS, TILE_SIDE, BF16_TILE_INPUTS]`, padded."""
    rows, inputs = x.shape
    full_tiles = inputs // BF16_TILE_INPUTS
    padded = np.zeros((TILE_SIDE, BF16_TILE_INPUTS), np.float32)
    for tile in range(terms.shape[0]):
        lines = min(TILE_SIDE, rows - tile * TILE_SIDE)
        if lines < TILE_SIDE:
            terms[tile] = 0
        for k_tile in range(full_tiles):
            for line in range(lines):
                split_line(x, tile * TILE_SIDE + line, k_tile * BF16_TILE_INPUTS, terms, tile, k_tile, line)
        if full_tiles < terms.shape[1]:
            for line in range(lines):
                for column in range(full_tiles * BF16_TILE_INPUTS, inputs):
                    padded[line, column - full_tiles * BF16_TILE_INPUTS] = x[tile * TILE_SIDE + line, column]
                split_line(padded, line, 0, terms, tile, full_tiles, line)


@compiled()
def split_weights(panel: Numbers, first: int, terms: Bf16Pairs) -> None:
    """Splits weights `[inputs, TILE_SIDE]` of one panel from input `first` on.

    `terms` is `[tiles of inputs, TERMS, TILE_SIDE, TILE_SIDE]`.
    """
    for k_tile in range(len(terms)):
        column = first + k_tile * BF16_TILE_INPUTS
        if column + BF16_TILE_INPUTS <= len(panel):
            for pair in range(TILE_SIDE):
                _split_pair(panel, column + pair, terms, k_tile, pair)
        else:
            padded = np.zeros((BF16_TILE_INPUTS, TILE_SIDE), panel.dtype)
            for row in range(column, len(panel)):
                for lane in range(TILE_SIDE):
                    padded[row - column, lane] = panel[row, lane]
            for pair in range(TILE_SIDE):
                _split_pair(padded, pair, terms, k_tile, pair)


def _typed_split_line(
    typing: Any, x: Any, row: Any, column: Any, terms: Any, tile: Any, k_tile: Any, line: Any
) -> Intrinsic:
    """Splits x[row, column : column + BF16_TILE_INPUTS] into a line of a tile of `terms`, which is contiguous."""
    int64 = types.int64
    return types.void(x, int64, int64, terms, int64, int64, int64), _generate_split_line


def _typed_split_pair(typing: Any, panel: Any, column: Any, terms: Any, k_tile: Any, pair: Any) -> Intrinsic:
    """Splits panel[column] and panel[column + TILE_SIDE] into a line of a tile of `terms`; both are contiguous."""
    int64 = types.int64
    return types.void(panel, int64, terms, int64, int64), _generate_split_pair


split_line: Callable[[Floats, int, int, Bf16, int, int, int], None] = cast(Any, intrinsic(_typed_split_line))
_split_pair: Callable[[Numbers, int, Bf16Pairs, int, int], None] = cast(Any, intrinsic(_typed_split_pair))


def put_pair_at(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, target: ir.Value) -> None:
    """Splits TILE_SIDE numbers at each of two addresses, and writes them in pairs to the same line of TERMS tiles."""
    put_pair(builder, load_as_float32(builder, first, TILE_SIDE), load_as_float32(builder, second, TILE_SIDE), target)


def put_pair(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, target: ir.Value) -> None:
    """Splits two vectors, and writes them in pairs to the same line of TERMS tiles."""
    both = (_split_terms(builder, numbers) for numbers in (first, second))
    for term, (lower, upper) in enumerate(zip(*both, strict=True)):
        paired = builder.or_(builder.lshr(lower, _SIXTEEN), builder.and_(upper, _UPPER))
        builder.store(paired, builder.gep(target, [INT64(term * TILE_SIDE)]), align=TILE_ROW_BYTES)


def _generate_split_line(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    x, row, column, terms, tile, k_tile, line = unpack_arrays(context, builder, signature, arguments)
    first = builder.gep(row_of(builder, x, row), [column])
    number = builder.add(builder.mul(tile, builder.extract_value(terms.shape, 1)), k_tile)
    put_pair_at(builder, first, builder.gep(first, [INT64(TILE_SIDE)]), line_of(builder, terms, number, line))
    return context.get_dummy_value()


def _generate_split_pair(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    panel, column, terms, k_tile, pair = unpack_arrays(context, builder, signature, arguments)
    first, second = (
        builder.gep(panel.data, [builder.mul(builder.add(column, INT64(stride)), INT64(TILE_SIDE))])
        for stride in (0, TILE_SIDE)
    )
    put_pair_at(builder, first, second, line_of(builder, terms, k_tile, pair))
    return context.get_dummy_value()


def line_of(builder: ir.IRBuilder, terms: Any, number: ir.Value, line: ir.Value) -> ir.Value:
    """Returns the address of a line of a tile's first term, by the tile's number."""
    tiles = builder.bitcast(terms.data, _BITS.as_pointer())
    return builder.gep(tiles, [builder.add(builder.mul(number, INT64(TERMS * TILE_SIDE)), line)])


def _split_terms(builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
    """Returns the bits of TERMS numbers whose sum is `values`; the upper half of each is a bfloat16."""
    terms_found = [builder.bitcast(values, _BITS)]
    while len(terms_found) < TERMS:
        # The first term is rounded to the nearest, so that the rest has either sign.
        rounded = builder.add(terms_found[-1], _HALF) if len(terms_found) == 1 else terms_found[-1]
        terms_found[-1] = builder.and_(rounded, _UPPER)
        values = builder.fsub(values, builder.bitcast(terms_found[-1], float_vector(TILE_SIDE)))
        terms_found.append(builder.bitcast(values, _BITS))
    return terms_found


# Tile registers: accumulators, then rows, then weights.
_ROWS, _WEIGHTS = ACCUMULATORS, ACCUMULATORS + BLOCK_TILES
# Which terms of rows and weights are multiplied: smallest products first, in an order that reloads few tiles.
_TERM_PAIRS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


def _typed_matmul_tiles(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    k_tile: Any,
    terms: Any,
    count: Any,
    sums: Any,
    next_panel: Any,
    panel: Any,
    column: Any,
    prefetched: Any,
) -> Intrinsic:
    """sums[r, o] = Σ rows[tile: r, k] · terms[o, k] over `count` tiles of inputs, those of rows from `k_tile` on.

    Multiplies 1 to BLOCK_TILES tiles of rows by BLOCK_TILES panels. `rows` is `[tiles of rows, tiles of inputs, TERMS,
    TILE_SIDE, 2 * TILE_SIDE]`, `terms` `[BLOCK_TILES, at least count, TERMS, TILE_SIDE, TILE_SIDE]`, `sums`
    `[any, BLOCK_TILES * TILE_SIDE]`, all contiguous. With each tile of inputs it prefetches `prefetched` cache lines of
    weight[panel, column:] and of the next panel.
    """
    int64 = types.int64
    kind = types.void(rows, int64, int64, int64, terms, int64, sums, next_panel, int64, int64, int64)
    return kind, _generate_matmul_tiles


def _typed_split_and_matmul_tiles(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    k_tile: Any,
    terms: Any,
    count: Any,
    sums: Any,
    next_panel: Any,
    panel: Any,
    column: Any,
    prefetched: Any,
    strip: Any,
    full_tiles: Any,
    ring_tiles: Any,
) -> Intrinsic:
    """Does the same, and splits weight[strip:] meanwhile: while one tile is multiplied, vectors split the next.

    It splits the first `full_tiles` tiles of inputs from `k_tile` on, at least one; later ones are in `terms` already.
    Tile n goes to terms[n modulo `ring_tiles`], a power of two.
    """
    kind, _ = _typed_matmul_tiles(
        typing, rows, tile, tiles, k_tile, terms, count, sums, next_panel, panel, column, prefetched
    )
    int64 = types.int64
    return types.void(*kind.args, int64, int64, int64), _generate_matmul_tiles


_MatmulTiles = Callable[[Bf16 | Bf16Pairs, int, int, int, Bf16Pairs, int, Floats, Numbers, int, int, int], None]
_SplitAndMatmulTiles = Callable[
    [Bf16, int, int, int, Bf16Pairs, int, Floats, Numbers, int, int, int, int, int, int], None
]
matmul_tiles: _MatmulTiles = cast(Any, intrinsic(_typed_matmul_tiles))
split_and_matmul_tiles: _SplitAndMatmulTiles = cast(Any, intrinsic(_typed_split_and_matmul_tiles))


def _generate_matmul_tiles(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    if not has_amx_instructions():
        # Never called here: the CPU lacks these instructions.
        return context.get_dummy_value()
    given = unpack_arrays(context, builder, signature, arguments)
    rows, tile, tiles, k_tile, terms, count, sums, next_panel, panel, column, prefetched = given[:11]
    tile_row_stride = builder.mul(builder.extract_value(rows.shape, 1), INT64(TERMS * TILE_BYTES))
    begin = builder.add(builder.mul(tile, tile_row_stride), builder.mul(k_tile, INT64(TERMS * TILE_BYTES)))
    lines = [
        byte_offset(builder, rows.data, builder.add(begin, builder.mul(tile_row_stride, INT64(n))))
        for n in range(BLOCK_TILES)
    ]
    stride = builder.extract_value(terms.strides, 0)
    panels = [byte_offset(builder, terms.data, builder.mul(stride, INT64(n))) for n in range(BLOCK_TILES)]
    following = builder.extract_value(next_panel.strides, 0)
    first = builder.add(
        builder.mul(panel, following), builder.mul(column, builder.extract_value(next_panel.strides, 1))
    )
    prefetch_addresses = [
        byte_offset(builder, next_panel.data, builder.add(first, builder.mul(following, INT64(n))))
        for n in range(BLOCK_TILES)
    ]
    splitting = _Splitting.of(builder, next_panel, k_tile, panels, *given[11:]) if len(given) > 11 else None
    if splitting is not None:
        splitting.split(builder, INT64(0), range(splitting.pairs))
    for number in switch_cases(builder, tiles, BLOCK_TILES):
        _sum(builder, lines[:number], panels, count, prefetch_addresses, prefetched, splitting)
        for line in range(number):
            for panel in range(BLOCK_TILES):
                target = byte_offset(
                    builder, sums.data, INT64((line * TILE_SIDE * BLOCK_TILES + panel) * TILE_ROW_BYTES)
                )
                instruct(
                    builder,
                    "tilestored64",
                    INT8(BLOCK_TILES * line + panel),
                    target,
                    INT64(BLOCK_TILES * TILE_ROW_BYTES),
                )
    return context.get_dummy_value()


@dataclass(frozen=True, slots=True)
class _Splitting:
    """Emits the splitting of weights, from `sources` to `targets`."""

    sources: Sequence[ir.Value]
    targets: Sequence[ir.Value]
    # The last tile of inputs to split, and the mask that maps a tile to its slot in the ring.
    last: ir.Value
    mask: ir.Value

    @classmethod
    def of(
        cls,
        builder: ir.IRBuilder,
        weight: Any,
        k_tile: ir.Value,
        targets: Sequence[ir.Value],
        strip: ir.Value,
        full_tiles: ir.Value,
        ring_tiles: ir.Value,
    ) -> _Splitting:
        """Splits `full_tiles` tiles of inputs from `k_tile` on; if there are fewer panels, the last one is repeated."""
        end = builder.sub(builder.extract_value(weight.shape, 0), INT64(1))
        begin = builder.mul(k_tile, INT64(BF16_TILE_INPUTS * TILE_SIDE))
        sources = []
        for number in range(BLOCK_TILES):
            panel = builder.add(strip, INT64(number))
            panel = builder.select(builder.icmp_signed("<", panel, end), panel, end)
            sources.append(builder.gep(row_of(builder, weight, panel), [begin]))
        lines = ir.VectorType(INT32, TILE_SIDE).as_pointer()
        targets = [builder.bitcast(target, lines) for target in targets]
        return cls(sources, targets, builder.sub(full_tiles, INT64(1)), builder.sub(ring_tiles, INT64(1)))

    def slot(self, builder: ir.IRBuilder, k_tile: ir.Value) -> ir.Value:
        """Returns the slot of a tile's terms."""
        return builder.and_(k_tile, self.mask)

    @property
    def pairs(self) -> int:
        """The pairs of weights in a tile of inputs, of all panels."""
        return BLOCK_TILES * TILE_SIDE

    def split(self, builder: ir.IRBuilder, k_tile: ir.Value, pairs: Iterable[int]) -> None:
        """Splits these pairs of a tile; after the last tile it splits that one again, which changes nothing."""
        k_tile = builder.select(builder.icmp_signed("<", k_tile, self.last), k_tile, self.last)
        column, line = (
            builder.mul(k_tile, INT64(BF16_TILE_INPUTS * TILE_SIDE)),
            builder.mul(self.slot(builder, k_tile), INT64(TERMS * TILE_SIDE)),
        )
        for number in pairs:
            panel, pair = divmod(number, TILE_SIDE)
            first = builder.gep(self.sources[panel], [builder.add(column, INT64(pair * TILE_SIDE))])
            second = builder.gep(first, [INT64(TILE_SIDE * TILE_SIDE)])
            for address in (first, second):
                prefetch(builder, byte_offset(builder, address, INT64(PREFETCH_BYTES)))
            put_pair_at(builder, first, second, builder.gep(self.targets[panel], [builder.add(line, INT64(pair))]))


def _sum(
    builder: ir.IRBuilder,
    lines: Sequence[ir.Value],
    panels: Sequence[ir.Value],
    count: ir.Value,
    prefetch_addresses: Sequence[ir.Value],
    prefetched: ir.Value,
    splitting: _Splitting | None,
) -> None:
    """Emits the loop over tiles of inputs; accumulators stay in registers."""
    for line in range(len(lines)):
        for panel in range(len(panels)):
            instruct(builder, "tilezero", INT8(BLOCK_TILES * line + panel))
    with for_range(builder, count) as step:
        loaded: dict[int, int] = {}

        def load(register: int, addresses: Sequence[ir.Value], term: int) -> None:
            if loaded.get(register) != term:
                loaded[register] = term
                column = step.index
                if splitting is not None and register == _WEIGHTS:
                    column = splitting.slot(builder, column)
                offset = builder.add(builder.mul(column, INT64(TERMS * TILE_BYTES)), INT64(term * TILE_BYTES))
                for number, address in enumerate(addresses):
                    instruct(
                        builder,
                        "tileloadd64",
                        INT8(register + number),
                        builder.gep(address, [offset]),
                        INT64(TILE_ROW_BYTES),
                    )

        for product, (of_rows, of_weights) in enumerate(_TERM_PAIRS):
            load(_ROWS, lines, of_rows)
            load(_WEIGHTS, panels, of_weights)
            for line in range(len(lines)):
                for panel in range(len(panels)):
                    registers = (BLOCK_TILES * line + panel, _ROWS + line, _WEIGHTS + panel)
                    instruct(builder, "tdpbf16ps", *map(INT8, registers))
            if splitting is not None:
                share = range(splitting.pairs)[product :: len(_TERM_PAIRS)]
                splitting.split(builder, builder.add(step.index, INT64(1)), share)
        with for_range(builder, prefetched) as line:
            offset = builder.mul(builder.add(builder.mul(step.index, prefetched), line.index), INT64(TILE_ROW_BYTES))
            for address in prefetch_addresses:
                prefetch(builder, builder.gep(address, [offset]))
