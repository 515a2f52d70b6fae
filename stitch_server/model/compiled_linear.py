"""Linear layers by the CPU kernels: packs a weight in panels, and multiplies by it on PyTorch's number of threads."""

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
from stitch_server.devices import HugePageArena, as_bits, as_float32, run_on_thread_pool
from stitch_server.model.quantized import quantize
from stitch_server.model.weights import WeightFormat

# For more tokens oneDNN has instructions for bfloat16, and for int8 without AMX, that the kernels don't use.
MAX_TOKENS_OF_NARROW_WEIGHTS = 16
# With fewer tokens AMX tiles take longer than vectors, since all weights have to be split.
MIN_AMX_TOKENS = 24
# In tiles, half of this many tokens take two thirds of the time.
EFFICIENT_AMX_TOKENS = 128
_ARENA = HugePageArena()


def is_faster_for(tokens: int, weight: Numbers) -> bool:
    """Whether kernels are faster than oneDNN; int32 weights are int8 for AMX tiles, uint32 weights int4."""
    return weight.dtype in (np.float32, np.int32, np.uint32) or tokens <= MAX_TOKENS_OF_NARROW_WEIGHTS


def instructions_for(tokens: int) -> Instructions:
    """Returns the instructions that multiply this many tokens."""
    return Instructions(tokens >= MIN_AMX_TOKENS and cpu.has_amx(), cpu.has_vnni())


def min_efficient_tokens(weight: Numbers) -> int:
    """Returns the number of tokens below which a matmul takes hardly less time."""
    return EFFICIENT_AMX_TOKENS if weight.dtype == np.float32 and cpu.has_amx() else 1


def pack_panels(weight: Tensor) -> Tensor:
    """Packs `[outputs, inputs, or words]` into panels `[panels, inputs, PANEL_OUTPUTS]`, padded with zeros.

    For AMX int8 becomes `[panels, words of four inputs, TILE_SIDE]`. Raises ValueError for too many inputs.
    """
    outputs, inputs = weight.shape
    if weight.dtype != torch.int8 or not cpu.has_amx():
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL_OUTPUTS))
        return padded.view(-1, PANEL_OUTPUTS, inputs).transpose(1, 2)
    if inputs > MAX_INT8_INPUTS:
        raise ValueError(f"an int8 matrix has {inputs} inputs, the most are {MAX_INT8_INPUTS}")
    padded = torch.nn.functional.pad(weight, (0, -inputs % INT8_TILE_INPUTS, 0, -outputs % TILE_SIDE))
    quads = padded.view(-1, TILE_SIDE, padded.shape[1] // 4, 4).transpose(1, 2)
    return quads.contiguous().view(torch.int32).squeeze(-1)


@dataclass(frozen=True, slots=True)
class CompiledLinear:
    """The layer x → x · weightᵀ + bias, with the weight in panels."""

    matrix: Matrix

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, weight_format: WeightFormat) -> CompiledLinear:
        """Makes the layer of a weight `[outputs, inputs]` of float32 or bfloat16."""
        outputs, inputs = weight.shape
        quantized, scales = quantize(weight, weight_format)
        scales = torch.ones(outputs) if scales is None else scales
        bias = torch.zeros(outputs) if bias is None else bias.to(torch.float32, copy=True)
        made = cls(Matrix(as_bits(_ARENA.copy(pack_panels(quantized))), scales.numpy(), bias.numpy()))
        # Compiles the kernel now, so that the first token doesn't wait for the compiler.
        made(torch.zeros(1, inputs))
        return made

    def is_faster_for(self, x: Tensor) -> bool:
        """Whether it is faster than oneDNN for these tokens; it has no gradient."""
        return is_faster_for(x.shape[0], self.matrix.weight) and not x.requires_grad

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, inputs]` to `[tokens, outputs]` of the same dtype, summed in float32.

        Only weights are quantized, never the inputs: more exact than oneDNN's matmul of int8 by int8.
        """
        inputs = as_float32(x)
        result = np.empty((x.shape[0], len(self.matrix.bias)), np.float32)
        run_on_thread_pool(partial(matmul_shared, inputs, self.matrix, result, instructions_for(len(inputs))))
        return torch.from_numpy(result).to(x.dtype)
