"""The AMX microkernel for bfloat16 tiles, accumulated in float32, on numbers that `bf16x3.py` has split.

Of the nine products of parts the six that count are computed; at that it still does four times what vectors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from stitch_server.cpu.amx import LINE, SIDE, SUMS, TILE, TILES, at, instruct
from stitch_server.cpu.features import knows_tiles
from stitch_server.cpu.matmul.bf16x3 import DEPTH, PARTS, Bf16, Bf16Pairs, pair_in_parts
from stitch_server.cpu.matmul.panels import BYTES_AHEAD
from stitch_server.cpu.scalars import Floats, Numbers
from stitch_server.cpu.vectors import INT8, INT32, INT64, Intrinsic, each_case, prefetch, row_of, unpacked

# Tile registers: accumulators, then rows, then weights.
_ROWS, _WEIGHTS = SUMS, SUMS + TILES
# Which parts of rows and weights are multiplied: smallest products first, in an order that reloads few tiles.
_PRODUCTS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


def _typed_multiply_tiles(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    deep: Any,
    parts: Any,
    count: Any,
    sums: Any,
    ahead: Any,
    panel: Any,
    place: Any,
    prefetched: Any,
) -> Intrinsic:
    """sums[r, o] = Σ rows[tile: r, k] · parts[o, k] over `count` tiles of inputs, those of rows from `deep` on.

    Of 1 to TILES tiles of rows and TILES panels: `rows` `[tiles of rows, tiles of inputs, PARTS, SIDE, 2 * SIDE]`,
    `parts` `[TILES, at least count, PARTS, SIDE, SIDE]`, `sums` `[any, TILES * SIDE]`, all contiguous.
    Prefetches `prefetched` cache lines with each tile of inputs, of ahead[panel, place:] and of the panel behind it.
    """
    whole = types.int64
    kind = types.void(rows, whole, whole, whole, parts, whole, sums, ahead, whole, whole, whole)
    return kind, _multiply_tiles


def _typed_split_and_multiply_tiles(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    deep: Any,
    parts: Any,
    count: Any,
    sums: Any,
    ahead: Any,
    panel: Any,
    place: Any,
    prefetched: Any,
    strip: Any,
    whole: Any,
    kept: Any,
) -> Intrinsic:
    """The same, but it splits weights itself, ahead[strip:]: while one tile is multiplied, vectors split the next.

    It splits the first `whole` tiles of inputs from `deep` on, at least one; later ones are in `parts` already. Tile n
    goes to parts[n modulo `kept`], a power of two.
    """
    kind, _ = _typed_multiply_tiles(
        typing, rows, tile, tiles, deep, parts, count, sums, ahead, panel, place, prefetched
    )
    whole = types.int64
    return types.void(*kind.args, whole, whole, whole), _multiply_tiles


_Multiply = Callable[[Bf16 | Bf16Pairs, int, int, int, Bf16Pairs, int, Floats, Numbers, int, int, int], None]
_SplitAndMultiply = Callable[[Bf16, int, int, int, Bf16Pairs, int, Floats, Numbers, int, int, int, int, int, int], None]
multiply_tiles: _Multiply = cast(Any, intrinsic(_typed_multiply_tiles))
split_and_multiply_tiles: _SplitAndMultiply = cast(Any, intrinsic(_typed_split_and_multiply_tiles))


def _multiply_tiles(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if not knows_tiles():
        # Never called here: the processor lacks these instructions.
        return context.get_dummy_value()
    given = unpacked(context, builder, signature, arguments)
    rows, tile, tiles, deep, parts, count, sums, ahead, panel, place, prefetched = given[:11]
    across = builder.mul(builder.extract_value(rows.shape, 1), INT64(PARTS * TILE))
    begin = builder.add(builder.mul(tile, across), builder.mul(deep, INT64(PARTS * TILE)))
    lines = [at(builder, rows.data, builder.add(begin, builder.mul(across, INT64(n)))) for n in range(TILES)]
    apart = builder.extract_value(parts.strides, 0)
    panels = [at(builder, parts.data, builder.mul(apart, INT64(n))) for n in range(TILES)]
    following = builder.extract_value(ahead.strides, 0)
    first = builder.add(builder.mul(panel, following), builder.mul(place, builder.extract_value(ahead.strides, 1)))
    later = [at(builder, ahead.data, builder.add(first, builder.mul(following, INT64(n)))) for n in range(TILES)]
    splitting = _Splitting.of(builder, ahead, deep, panels, *given[11:]) if len(given) > 11 else None
    if splitting is not None:
        splitting.split(builder, INT64(0), range(splitting.pairs))
    for number in each_case(builder, tiles, TILES):
        _sum(builder, lines[:number], panels, count, later, prefetched, splitting)
        for line in range(number):
            for panel in range(TILES):
                target = at(builder, sums.data, INT64((line * SIDE * TILES + panel) * LINE))
                instruct(builder, "tilestored64", INT8(TILES * line + panel), target, INT64(TILES * LINE))
    return context.get_dummy_value()


@dataclass(frozen=True, slots=True)
class _Splitting:
    """Emits the splitting of weights: where they are, and where their parts go."""

    sources: Sequence[ir.Value]
    targets: Sequence[ir.Value]
    # The last tile of inputs to split, and the mask that maps a tile to its place.
    last: ir.Value
    mask: ir.Value

    @classmethod
    def of(
        cls,
        builder: ir.IRBuilder,
        weight: Any,
        deep: ir.Value,
        targets: Sequence[ir.Value],
        strip: ir.Value,
        whole: ir.Value,
        kept: ir.Value,
    ) -> _Splitting:
        """For `whole` tiles of inputs from `deep` on; where there are fewer panels, the last one is repeated."""
        end = builder.sub(builder.extract_value(weight.shape, 0), INT64(1))
        begin = builder.mul(deep, INT64(DEPTH * SIDE))
        sources = []
        for number in range(TILES):
            panel = builder.add(strip, INT64(number))
            panel = builder.select(builder.icmp_signed("<", panel, end), panel, end)
            sources.append(builder.gep(row_of(builder, weight, panel), [begin]))
        lines = ir.VectorType(INT32, SIDE).as_pointer()
        targets = [builder.bitcast(target, lines) for target in targets]
        return cls(sources, targets, builder.sub(whole, INT64(1)), builder.sub(kept, INT64(1)))

    def place(self, builder: ir.IRBuilder, deep: ir.Value) -> ir.Value:
        """The place of a tile's parts."""
        return builder.and_(deep, self.mask)

    @property
    def pairs(self) -> int:
        """Pairs of weights in a tile of inputs, of all panels."""
        return TILES * SIDE

    def split(self, builder: ir.IRBuilder, deep: ir.Value, pairs: Iterable[int]) -> None:
        """Splits these pairs of a tile; behind the last tile that one again, which changes nothing."""
        deep = builder.select(builder.icmp_signed("<", deep, self.last), deep, self.last)
        place, line = (
            builder.mul(deep, INT64(DEPTH * SIDE)),
            builder.mul(self.place(builder, deep), INT64(PARTS * SIDE)),
        )
        for number in pairs:
            panel, pair = divmod(number, SIDE)
            first = builder.gep(self.sources[panel], [builder.add(place, INT64(pair * SIDE))])
            second = builder.gep(first, [INT64(SIDE * SIDE)])
            for one in (first, second):
                prefetch(builder, at(builder, one, INT64(BYTES_AHEAD)))
            pair_in_parts(builder, first, second, builder.gep(self.targets[panel], [builder.add(line, INT64(pair))]))


def _sum(
    builder: ir.IRBuilder,
    lines: Sequence[ir.Value],
    panels: Sequence[ir.Value],
    count: ir.Value,
    later: Sequence[ir.Value],
    prefetched: ir.Value,
    splitting: _Splitting | None,
) -> None:
    """The loop over tiles of inputs; accumulators stay in registers."""
    for line in range(len(lines)):
        for panel in range(len(panels)):
            instruct(builder, "tilezero", INT8(TILES * line + panel))
    with for_range(builder, count) as step:
        loaded: dict[int, int] = {}

        def load(register: int, addresses: Sequence[ir.Value], part: int) -> None:
            if loaded.get(register) != part:
                loaded[register] = part
                place = step.index
                if splitting is not None and register == _WEIGHTS:
                    place = splitting.place(builder, place)
                offset = builder.add(builder.mul(place, INT64(PARTS * TILE)), INT64(part * TILE))
                for number, address in enumerate(addresses):
                    instruct(
                        builder, "tileloadd64", INT8(register + number), builder.gep(address, [offset]), INT64(LINE)
                    )

        for product, (of_rows, of_weights) in enumerate(_PRODUCTS):
            load(_ROWS, lines, of_rows)
            load(_WEIGHTS, panels, of_weights)
            for line in range(len(lines)):
                for panel in range(len(panels)):
                    registers = (TILES * line + panel, _ROWS + line, _WEIGHTS + panel)
                    instruct(builder, "tdpbf16ps", *map(INT8, registers))
            if splitting is not None:
                share = range(splitting.pairs)[product :: len(_PRODUCTS)]
                splitting.split(builder, builder.add(step.index, INT64(1)), share)
        with for_range(builder, prefetched) as line:
            offset = builder.mul(builder.add(builder.mul(step.index, prefetched), line.index), INT64(LINE))
            for address in later:
                prefetch(builder, builder.gep(address, [offset]))
