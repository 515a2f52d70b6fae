"""Products by compiled loops, on as many threads as PyTorch has. Doesn't know what a product is for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stitch_server import processor
from stitch_server.arrays import floats, numbers
from stitch_server.crew import together
from stitch_server.loops.amx import SIDE
from stitch_server.loops.digits import DEPTH, MOST_INPUTS
from stitch_server.loops.instructions import Instructions
from stitch_server.loops.matrix import Matrix
from stitch_server.loops.numbers import Numbers
from stitch_server.loops.panels import LANES
from stitch_server.loops.products import multiply_shared
from stitch_server.model.product import Keeping, kept_rows
from stitch_server.pages import LargePages

# For bfloat16 processors have instructions, and for bytes those without tiles, which a library uses and loops don't.
MOST_ROWS_OF_NARROW_WEIGHTS = 16
# With fewer rows tiles take longer than vectors, since all weights have to be split.
FEWEST_ROWS_IN_TILES = 24
# Half of these take two thirds of their time there.
ROWS_WORTH_SPLITTING = 128
# Matrices, one behind the other.
_PAGES = LargePages()


def suits(rows: int, weight: Numbers) -> bool:
    """Whether loops are the faster way for so many rows by this weight; int32 are bytes in tiles, uint32 four bits."""
    return weight.dtype in (np.float32, np.int32, np.uint32) or rows <= MOST_ROWS_OF_NARROW_WEIGHTS


def instructions(rows: int) -> Instructions:
    """Those that so many rows are multiplied by."""
    return Instructions(rows >= FEWEST_ROWS_IN_TILES and processor.has_tiles(), processor.knows_dots())


def rows_worth_a_product(weight: Numbers) -> int:
    """Fewer take hardly less time by this weight."""
    return ROWS_WORTH_SPLITTING if weight.dtype == np.float32 and processor.has_tiles() else 1


def panels_of(weight: Tensor) -> Tensor:
    """`[outputs, inputs, or words]` to `[panels, inputs, LANES]`, filled up with zeros, as `loops.panels` says.

    Bytes for tiles to `[panels, quads of inputs, SIDE]`, as `loops.digits` says. Raises ValueError for too many inputs.
    """
    outputs, inputs = weight.shape
    if weight.dtype != torch.int8 or not processor.has_tiles():
        filled = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % LANES))
        return filled.view(-1, LANES, inputs).transpose(1, 2)
    if inputs > MOST_INPUTS:
        raise ValueError(f"a matrix of bytes has {inputs} inputs, the most are {MOST_INPUTS}")
    filled = torch.nn.functional.pad(weight, (0, -inputs % DEPTH, 0, -outputs % SIDE))
    quads = filled.view(-1, SIDE, filled.shape[1] // 4, 4).transpose(1, 2)
    return quads.contiguous().view(torch.int32).squeeze(-1)


@dataclass(frozen=True, slots=True)
class LoopProduct:
    """The product by a matrix in panels."""

    matrix: Matrix

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, keeping: Keeping) -> LoopProduct:
        """A weight `[outputs, inputs]` of float32 or bfloat16."""
        outputs, inputs = weight.shape
        rows, scales = kept_rows(weight, keeping)
        scales = torch.ones(outputs) if scales is None else scales
        bias = torch.zeros(outputs) if bias is None else bias.to(torch.float32, copy=True)
        made = cls(Matrix(numbers(_PAGES.copied(panels_of(rows))), scales.numpy(), bias.numpy()))
        # Compiled here, and not while the first token waits.
        made(torch.zeros(1, inputs))
        return made

    def suits(self, x: Tensor) -> bool:
        """Whether it is the faster way for these rows; it has no gradient."""
        return suits(x.shape[0], self.matrix.weight) and not x.requires_grad

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, inputs]` to `[rows, outputs]` of the same dtype, summed in float32.

        Rows stay as they are: with bytes that is more exact than a product that rounds them, too.
        """
        rows = floats(x)
        result = np.empty((x.shape[0], len(self.matrix.bias)), np.float32)
        together(partial(multiply_shared, rows, self.matrix, result, instructions(len(rows))))
        return torch.from_numpy(result).to(x.dtype)
