"""The matmul kernels against NumPy: float32, bfloat16 and int8 weights that are packed here."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stitch_server.cpu import (
    INT8_TILE_INPUTS,
    PANEL_OUTPUTS,
    TILE_SIDE,
    Instructions,
    Matrix,
    has_amx,
    matmul_shared,
    new_task_counts,
)

pytestmark = pytest.mark.slow

OUTPUTS, INPUTS = 53, 70
VECTORS, AMX = Instructions(amx=False, vnni=False), Instructions(amx=True, vnni=False)
needs_amx = pytest.mark.skipif(not has_amx(), reason="this CPU has no AMX")


def pack(weight: NDArray[np.generic]) -> NDArray[np.generic]:
    """`[outputs, inputs]` to panels `[panels, inputs, PANEL_OUTPUTS]`, padded with zeros."""
    padded = np.pad(weight, ((0, -len(weight) % PANEL_OUTPUTS), (0, 0)))
    return np.ascontiguousarray(padded.reshape(-1, PANEL_OUTPUTS, weight.shape[1]).transpose(0, 2, 1))


def pack_tiles(weight: NDArray[np.int8]) -> NDArray[np.int32]:
    """`[outputs, inputs]` to `[panels, words of four inputs, TILE_SIDE]`, padded with zeros."""
    padded = np.pad(weight, ((0, -len(weight) % TILE_SIDE), (0, -weight.shape[1] % INT8_TILE_INPUTS)))
    quads = padded.reshape(-1, TILE_SIDE, padded.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(quads).view(np.int32)[..., 0]


def drawn(tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Inputs `[tokens, INPUTS]`, a weight `[OUTPUTS, INPUTS]` and a bias `[OUTPUTS]`."""
    draw = np.random.default_rng(tokens)
    return tuple(draw.standard_normal(shape, np.float32) for shape in ((tokens, INPUTS), (OUTPUTS, INPUTS), OUTPUTS))  # type: ignore[return-value]


def multiply(x: NDArray[np.float32], matrix: Matrix, instructions: Instructions) -> NDArray[np.float32]:
    result = np.full((len(x), len(matrix.bias)), np.nan, np.float32)
    matmul_shared(x, matrix, result, instructions, 1, new_task_counts())
    return result


@pytest.mark.parametrize(
    ("tokens", "instructions"), [(1, VECTORS), (3, VECTORS), (40, VECTORS), pytest.param(40, AMX, marks=needs_amx)]
)
def test_float32_matmul_matches_numpy(tokens: int, instructions: Instructions) -> None:
    x, weight, bias = drawn(tokens)
    scales = np.linspace(1, 2, OUTPUTS, dtype=np.float32)
    got = multiply(x, Matrix(pack(weight), scales, bias), instructions)
    exact = x.astype(np.float64) @ (weight * scales[:, None]).astype(np.float64).T + bias
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 13])
def test_bfloat16_matmul_matches_numpy(tokens: int) -> None:
    x, weight, bias = drawn(tokens)
    upper_halves = (weight.view(np.uint32) >> 16).astype(np.uint16)
    got = multiply(x, Matrix(pack(upper_halves), np.ones(OUTPUTS, np.float32), bias), VECTORS)
    bfloat16 = (upper_halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(got, x.astype(np.float64) @ bfloat16.astype(np.float64).T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "tiles"), [(1, False), (9, False), *(pytest.param(n, True, marks=needs_amx) for n in (1, 9, 40))]
)
def test_int8_matmul_matches_numpy(tokens: int, tiles: bool) -> None:
    x, weight, bias = drawn(tokens)
    int8 = np.round(weight * 30).astype(np.int8)
    scales = np.full(OUTPUTS, 1 / 30, np.float32)
    packed = pack_tiles(int8) if tiles else pack(int8)
    got = multiply(x, Matrix(packed, scales, bias), AMX if tiles else VECTORS)
    exact = x.astype(np.float64) @ (int8 / 30.0).T + bias
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)
