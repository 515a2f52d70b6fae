"""Linear layers by compiled kernels, on as many threads as PyTorch has. Doesn't know whose layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stitch_server import cpu
from stitch_server.cpu import (
    INT8_TILE_INPUTS,
    MAX_INT8_INPUTS,
    PANEL_OUTPUTS,
    TILE_SIDE,
    Instructions,
    Matrix,
    Numbers,
    matmul_shared,
)
from stitch_server.devices import as_bits, as_float32
from stitch_server.huge_pages import HugePageArena
from stitch_server.model.linear import WeightFormat, packed_rows
from stitch_server.thread_pool import run_on_thread_pool

# For more rows oneDNN has instructions for bfloat16, and for int8 without AMX, that kernels here don't use.
MOST_ROWS_OF_NARROW_WEIGHTS = 16
# With fewer rows AMX tiles take longer than vectors, since all weights have to be split.
FEWEST_ROWS_IN_TILES = 24
# In tiles, half of so many rows take two thirds of the time.
ROWS_WORTH_SPLITTING = 128
_PAGES = HugePageArena()


def suits(rows: int, weight: Numbers) -> bool:
    """Whether kernels are faster than oneDNN for so many rows; int32 weights are int8 for tiles, uint32 int4."""
    return weight.dtype in (np.float32, np.int32, np.uint32) or rows <= MOST_ROWS_OF_NARROW_WEIGHTS


def instructions(rows: int) -> Instructions:
    """Which instructions multiply so many rows."""
    return Instructions(rows >= FEWEST_ROWS_IN_TILES and cpu.has_amx(), cpu.has_vnni())


def rows_worth_a_product(weight: Numbers) -> int:
    """A number of rows of which fewer take hardly less time."""
    return ROWS_WORTH_SPLITTING if weight.dtype == np.float32 and cpu.has_amx() else 1


def panels_of(weight: Tensor) -> Tensor:
    """Packs `[outputs, inputs, or words]` into panels `[panels, inputs, LANES]`, padded with zeros.

    For AMX int8 becomes `[panels, words of four inputs, SIDE]`. Raises ValueError for too many inputs.
    """
    outputs, inputs = weight.shape
    if weight.dtype != torch.int8 or not cpu.has_amx():
        filled = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL_OUTPUTS))
        return filled.view(-1, PANEL_OUTPUTS, inputs).transpose(1, 2)
    if inputs > MAX_INT8_INPUTS:
        raise ValueError(f"a matrix of bytes has {inputs} inputs, the most are {MAX_INT8_INPUTS}")
    filled = torch.nn.functional.pad(weight, (0, -inputs % INT8_TILE_INPUTS, 0, -outputs % TILE_SIDE))
    quads = filled.view(-1, TILE_SIDE, filled.shape[1] // 4, 4).transpose(1, 2)
    return quads.contiguous().view(torch.int32).squeeze(-1)


@dataclass(frozen=True, slots=True)
class CompiledLinear:
    """x → x · weightᵀ + bias, with the weight in panels."""

    matrix: Matrix

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, weight_format: WeightFormat) -> CompiledLinear:
        """A weight `[outputs, inputs]` of float32 or bfloat16."""
        outputs, inputs = weight.shape
        rows, scales = packed_rows(weight, weight_format)
        scales = torch.ones(outputs) if scales is None else scales
        bias = torch.zeros(outputs) if bias is None else bias.to(torch.float32, copy=True)
        made = cls(Matrix(as_bits(_PAGES.copy(panels_of(rows))), scales.numpy(), bias.numpy()))
        # Compiled here, and not while the first token waits.
        made(torch.zeros(1, inputs))
        return made

    def suits(self, x: Tensor) -> bool:
        """Whether it is the faster way for these rows; it has no gradient."""
        return suits(x.shape[0], self.matrix.weight) and not x.requires_grad

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, inputs]` to `[rows, outputs]` of the same dtype, summed in float32.

        Only weights are quantized, never rows: more exact than oneDNN's product of int8 by int8.
        """
        rows = as_float32(x)
        result = np.empty((x.shape[0], len(self.matrix.bias)), np.float32)
        run_on_thread_pool(partial(matmul_shared, rows, self.matrix, result, instructions(len(rows))))
        return torch.from_numpy(result).to(x.dtype)
