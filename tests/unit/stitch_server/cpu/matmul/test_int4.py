"""The int4 kernels: against NumPy on weights that are packed here, and as linear layers in both ways to multiply."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stitch_server import cpu
from stitch_server.cpu import INT4_GROUP, INT4_SHIFTS, INT4_WORD_INPUTS, Instructions, Matrix, has_vnni
from stitch_server.model import compiled_linear
from stitch_server.model.compiled_linear import CompiledLinear, is_faster_for
from stitch_server.model.linear import linear
from stitch_server.model.quantized import from_int4, to_int4
from stitch_server.model.weights import WeightFormat
from tests.support.linear_operands import linear_operands

pytestmark = pytest.mark.slow

KERNELS, INT4_KERNELS = WeightFormat(kernels=True), WeightFormat("int4", kernels=True)
GROUPS, OUTPUTS = 3, 2 * cpu.PANEL_OUTPUTS
ONE_GROUP_PADDED, SEVERAL_GROUPS, TILE_BLOCKS = 37, 400, 1200


@pytest.fixture(params=[True, False])
def vnni(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether VNNI multiplies by the steps; else weights are dequantized."""
    if request.param and not has_vnni():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(cpu, "has_vnni", lambda: request.param)
    return bool(request.param)


def pack(steps: NDArray[np.uint32], step: NDArray[np.float16], least: NDArray[np.float16]) -> NDArray[np.uint32]:
    """Steps `[outputs, groups, INT4_GROUP]` and both numbers `[outputs, groups]` to panels of words."""
    shifted = steps.reshape(*steps.shape[:2], -1, INT4_WORD_INPUTS) << np.array(INT4_SHIFTS, np.uint32)
    pairs = step.view(np.uint16).astype(np.uint32) | least.view(np.uint16).astype(np.uint32) << 16
    words = np.concatenate([shifted.sum(-1, dtype=np.uint32), pairs[..., None]], -1).reshape(OUTPUTS, -1)
    return np.ascontiguousarray(words.reshape(-1, cpu.PANEL_OUTPUTS, words.shape[1]).transpose(0, 2, 1))


@pytest.mark.parametrize("tokens", [1, 5])
def test_int4_matmul_matches_numpy(tokens: int, vnni: bool) -> None:
    draw = np.random.default_rng(tokens)
    steps = draw.integers(0, 16, (OUTPUTS, GROUPS, INT4_GROUP), np.uint32)
    step, least = (draw.standard_normal((OUTPUTS, GROUPS)).astype(np.float16) for _ in range(2))
    bias = draw.standard_normal(OUTPUTS, np.float32)
    x = draw.standard_normal((tokens, GROUPS * INT4_GROUP), np.float32)
    result = np.empty((tokens, OUTPUTS), np.float32)
    matrix = Matrix(pack(steps, step, least), np.ones(OUTPUTS, np.float32), bias)
    cpu.matmul_shared(x, matrix, result, Instructions(False, vnni), 1, cpu.new_task_counts())
    weight = (steps * step[..., None].astype(np.float64) + least[..., None]).reshape(OUTPUTS, -1)
    np.testing.assert_allclose(result, x @ weight.T + bias, rtol=1e-5, atol=1e-3)


# One token, several and more than are multiplied together, many, and those that AMX takes.
@pytest.mark.parametrize(
    ("tokens", "inputs", "biased"),
    [
        (0, ONE_GROUP_PADDED, True),
        (1, ONE_GROUP_PADDED, False),
        (1, TILE_BLOCKS, True),
        (2, SEVERAL_GROUPS, True),
        (3, TILE_BLOCKS, False),
        (7, SEVERAL_GROUPS, False),
        (23, ONE_GROUP_PADDED, True),
        (24, SEVERAL_GROUPS, True),
        (40, TILE_BLOCKS, False),
        (200, ONE_GROUP_PADDED, False),
    ],
)
@pytest.mark.usefixtures("vnni")
def test_int4_linear_returns_the_matmul(tokens: int, inputs: int, biased: bool) -> None:
    x, weight, bias = linear_operands(tokens, inputs)
    exact = x.double() @ from_int4(to_int4(weight))[:, :inputs].double().T + (bias.double() if biased else 0.0)
    got = linear(weight, bias if biased else None, INT4_KERNELS)(x)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "inputs"), [(1, 37), (3, 400), (13, 1200), (23, 37), (24, 400), (40, 1200), (200, 37)]
)
def test_int4_linear_equals_float32_linear_when_dequantized(tokens: int, inputs: int, vnni: bool) -> None:
    """To the last bit when dequantized; by VNNI as exact, of short sums nearly so."""
    x, weight, bias = linear_operands(tokens, inputs)
    near = from_int4(to_int4(weight))[:, :inputs].contiguous()
    got, expected = linear(weight, bias, INT4_KERNELS)(x), linear(near, bias, KERNELS)(x)
    if not vnni or compiled_linear.instructions_for(tokens).amx:
        assert torch.equal(got, expected)
    else:
        exact = x.double() @ near.double().T + bias.double()
        assert not torch.equal(got, expected)
        assert (got - exact).square().mean() <= 4 * (expected - exact).square().mean()


@pytest.mark.parametrize("inputs", [ONE_GROUP_PADDED, TILE_BLOCKS])
def test_int4_output_of_a_token_does_not_depend_on_the_others(inputs: int) -> None:
    x, weight, bias = linear_operands(16, inputs)
    multiply = linear(weight, bias, INT4_KERNELS)
    together = multiply(x)
    for first in range(16):
        for end in range(first + 1, 17):
            assert torch.equal(multiply(x[first:end]), together[first:end])


@pytest.mark.skipif(not cpu.has_amx(), reason="this CPU has no AMX")
def test_int4_output_of_a_token_does_not_depend_on_many_others() -> None:
    x, weight, bias = linear_operands(200, TILE_BLOCKS)
    multiply = linear(weight, bias, INT4_KERNELS)
    together = multiply(x)
    for first, end in ((0, 24), (1, 25), (7, 120), (100, 200), (150, 199)):
        assert torch.equal(multiply(x[first:end]), together[first:end])


@pytest.mark.parametrize(("value", "tokens"), [(float("nan"), 2), (float("inf"), 6), (float("-inf"), 50)])
def test_non_finite_input_makes_only_its_token_non_finite(value: float, tokens: int) -> None:
    x, weight, _ = linear_operands(tokens, SEVERAL_GROUPS)
    x[1, 5] = value
    finite = linear(weight, None, INT4_KERNELS)(x).isfinite()
    assert not bool(finite[1].any())
    assert bool(finite[[token for token in range(tokens) if token != 1]].all())


def test_int4_weights_are_kept_in_the_layout_of_the_kernels_alone() -> None:
    assert isinstance(linear(torch.zeros(3, 2), None, INT4_KERNELS), CompiledLinear)
    assert is_faster_for(1000, np.zeros(1, np.uint32))
