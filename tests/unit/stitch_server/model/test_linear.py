"""Linear layers return x · weightᵀ + bias in every layout of the weight; those without kernels pass on gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stitch_server import cpu
from stitch_server.model.compiled_linear import CompiledLinear, is_faster_for, pack_panels
from stitch_server.model.linear import Linear, PackedLinear, PlainLinear, TwoLayoutLinear, linear
from stitch_server.model.quantized import quantize, to_int8
from stitch_server.model.weights import WeightFormat, has_onednn
from tests.support.linear_operands import linear_operands

CPU = torch.device("cpu")
KERNELS, INT8_KERNELS = WeightFormat(kernels=True), WeightFormat("int8", kernels=True)
# Inputs of one block in the cache, of several, and of several blocks of AMX tiles; the last panel is padded.
ONE_BLOCK, TWO_BLOCKS, TILE_BLOCKS = 37, 400, 1200


@pytest.fixture
def amx() -> None:
    if not cpu.has_amx():
        pytest.skip("this CPU has no AMX")


@pytest.fixture
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: False)


def layouts(weight: Tensor, bias: Tensor | None) -> list[Linear]:
    return [linear(weight, bias), PlainLinear(weight, bias)]


@pytest.mark.parametrize(
    ("tokens", "biased"), [(0, True), (1, True), (1, False), (2, False), (8, True), (33, False), (200, True)]
)
def test_linear_returns_the_matmul_in_both_library_layouts(tokens: int, biased: bool) -> None:
    x, weight, bias = linear_operands(tokens)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
    for multiply in layouts(weight, bias if biased else None):
        torch.testing.assert_close(multiply(x).double(), exact, rtol=1e-5, atol=1e-5)


def assert_multiplies_by_int8(tokens: int, inputs: int, biased: bool) -> None:
    """Only the weights are rounded, not the tokens' inputs."""
    x, weight, bias = linear_operands(tokens, inputs)
    int8, scales = to_int8(weight)
    exact = x.double() @ (int8.double() * scales.double()[:, None]).T + (bias.double() if biased else 0.0)
    got = linear(weight, bias if biased else None, INT8_KERNELS)(x)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_three_threads")
class TestKernels:
    # No token, one register tile and its borders, and what AMX takes where the CPU has it.
    @pytest.mark.parametrize(
        ("tokens", "inputs", "biased"),
        [
            (0, ONE_BLOCK, True),
            (1, ONE_BLOCK, True),
            (1, TILE_BLOCKS, False),
            (2, TWO_BLOCKS, True),
            (3, ONE_BLOCK, False),
            (12, TWO_BLOCKS, False),
            (13, TILE_BLOCKS, True),
            (23, TWO_BLOCKS, True),
            (24, ONE_BLOCK, False),
            (24, TILE_BLOCKS, True),
            (49, TWO_BLOCKS, True),
            (500, ONE_BLOCK, True),
            (500, TILE_BLOCKS, False),
        ],
    )
    def test_float32_kernel_returns_the_matmul(self, tokens: int, inputs: int, biased: bool) -> None:
        x, weight, bias = linear_operands(tokens, inputs)
        exact = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
        compiled = linear(weight, bias if biased else None, KERNELS)
        torch.testing.assert_close(compiled(x).double(), exact, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("inputs", [ONE_BLOCK, TWO_BLOCKS, TILE_BLOCKS])
    def test_amx_is_as_exact_as_vectors(self, inputs: int, amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight, _ = linear_operands(128, inputs)
        exact = x.double() @ weight.double().T
        tiles = linear(weight, None, KERNELS)(x)
        monkeypatch.setattr(cpu, "has_amx", lambda: False)
        vectors = linear(weight, None, KERNELS)(x)
        assert not torch.equal(tiles, vectors)
        assert (tiles - exact).square().mean() <= 1.1 * (vectors - exact).square().mean()

    @pytest.mark.parametrize(("tokens", "inputs"), [(1, ONE_BLOCK), (4, TWO_BLOCKS), (6, TILE_BLOCKS)])
    def test_bfloat16_kernel_returns_the_matmul(self, tokens: int, inputs: int) -> None:
        x, weight, bias = (one.bfloat16() for one in linear_operands(tokens, inputs))
        got = linear(weight, bias, KERNELS)(x)
        assert got.dtype is torch.bfloat16
        exact = x.double() @ weight.double().T + bias.double()
        # A bfloat16 has eight bits; the bias is added to one.
        torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-6)

    @pytest.mark.parametrize(
        ("tokens", "inputs", "biased"),
        [(0, ONE_BLOCK, True), (1, TWO_BLOCKS, False), (2, TILE_BLOCKS, True), (7, ONE_BLOCK, False), (16, 400, True)],
    )
    @pytest.mark.usefixtures("no_amx")
    def test_int8_kernel_does_not_round_inputs_in_vectors(self, tokens: int, inputs: int, biased: bool) -> None:
        assert_multiplies_by_int8(tokens, inputs, biased)

    # One tile of lines, several, and more than are multiplied together.
    @pytest.mark.parametrize("tokens", [0, 1, 5, 6, 10, 11, 33, 100, 290, 500])
    @pytest.mark.parametrize("inputs", [ONE_BLOCK, TILE_BLOCKS])
    def test_int8_kernel_does_not_round_inputs_in_amx_tiles(self, tokens: int, inputs: int, amx: None) -> None:
        assert_multiplies_by_int8(tokens, inputs, biased=tokens % 2 == 0)

    @pytest.mark.parametrize(("largest", "inputs"), [(1e-35, 37), (1e-20, 400), (1e4, 1200), (1e30, 37)])
    def test_int8_error_is_relative_to_the_largest_input_of_a_token(
        self, inputs: int, largest: float, amx: None
    ) -> None:
        x, weight, _ = linear_operands(3, inputs)
        x[1] *= largest / x[1].abs().max()
        x[2, 7] = largest
        int8, scales = to_int8(weight)
        weight = int8.double() * scales.double()[:, None]
        errors = (linear(weight.float(), None, INT8_KERNELS)(x).double() - x.double() @ weight.T).abs()
        limits = x.double().abs().amax(dim=1) * weight.abs().sum(dim=1).max() * 2**-23 + 1e-30
        assert bool((errors <= limits[:, None]).all())

    def test_int8_kernel_refuses_inputs_whose_sums_overflow(self, amx: None) -> None:
        with pytest.raises(ValueError, match="131073 inputs, the most are 131072"):
            linear(torch.zeros(1, 131073), None, INT8_KERNELS)

    @pytest.mark.parametrize(("tokens", "inputs"), [(17, ONE_BLOCK), (40, TWO_BLOCKS)])
    @pytest.mark.usefixtures("no_amx")
    def test_int8_without_amx_leaves_many_tokens_to_onednn(self, tokens: int, inputs: int) -> None:
        x, weight, bias = linear_operands(tokens, inputs)
        assert torch.equal(linear(weight, bias, INT8_KERNELS)(x), linear(weight, bias, WeightFormat("int8"))(x))

    def test_int8_kernel_keeps_the_dtype_of_the_inputs(self) -> None:
        x, weight, bias = (one.bfloat16() for one in linear_operands(1))
        assert linear(weight, bias, INT8_KERNELS)(x).dtype is torch.bfloat16

    @pytest.mark.parametrize(
        ("weight_format", "inputs"), [(KERNELS, ONE_BLOCK), (KERNELS, TILE_BLOCKS), (INT8_KERNELS, TWO_BLOCKS)]
    )
    def test_output_of_a_token_does_not_depend_on_a_few_others(self, inputs: int, weight_format: WeightFormat) -> None:
        """To the last bit, so that an answer doesn't depend on the other requests."""
        x, weight, bias = linear_operands(16, inputs)
        multiply = linear(weight, bias, weight_format)
        together = multiply(x)
        for first in range(16):
            for end in range(first + 1, 17):
                assert torch.equal(multiply(x[first:end]), together[first:end])

    @pytest.mark.parametrize(("weight_format", "tokens"), [(KERNELS, 2), (KERNELS, 50), (INT8_KERNELS, 6)])
    def test_one_thread_computes_the_same_as_three(self, weight_format: WeightFormat, tokens: int) -> None:
        x, weight, bias = linear_operands(tokens, TWO_BLOCKS)
        multiply = linear(weight, bias, weight_format)
        shared = multiply(x)
        torch.set_num_threads(1)
        assert torch.equal(multiply(x), shared)

    @pytest.mark.parametrize(("weight_format", "fewest"), [(KERNELS, 24), (INT8_KERNELS, 1)])
    @pytest.mark.parametrize("inputs", [ONE_BLOCK, TILE_BLOCKS])
    def test_output_of_a_token_does_not_depend_on_many_others(
        self, inputs: int, weight_format: WeightFormat, fewest: int, amx: None
    ) -> None:
        x, weight, bias = linear_operands(200, inputs)
        multiply = linear(weight, bias, weight_format)
        together = multiply(x)
        for first, end in ((0, fewest), (1, 1 + fewest), (7, 120), (100, 200), (150, 199)):
            assert torch.equal(multiply(x[first:end]), together[first:end])

    @pytest.mark.skipif(not has_onednn(CPU, torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU")
    @pytest.mark.parametrize(("tokens", "few"), [(1, True), (16, True), (17, False)])
    def test_bfloat16_kernel_multiplies_a_few_tokens_only(self, tokens: int, few: bool) -> None:
        multiply = linear(torch.ones(3, 37, dtype=torch.bfloat16), None, KERNELS)
        assert isinstance(multiply, TwoLayoutLinear)
        marked = replace(multiply, many=torch.zeros_like)
        assert bool((marked(torch.ones(tokens, 37, dtype=torch.bfloat16)) == 37).all()) is few

    @pytest.mark.parametrize(
        ("value", "weight_format", "tokens", "inputs"),
        [
            (float("nan"), KERNELS, 2, ONE_BLOCK),
            (float("inf"), KERNELS, 6, TWO_BLOCKS),
            (float("-inf"), KERNELS, 50, TILE_BLOCKS),
            (float("nan"), INT8_KERNELS, 50, ONE_BLOCK),
            (float("inf"), INT8_KERNELS, 2, TILE_BLOCKS),
            (float("-inf"), INT8_KERNELS, 6, TWO_BLOCKS),
        ],
    )
    def test_non_finite_input_makes_only_its_token_non_finite(
        self, value: float, weight_format: WeightFormat, tokens: int, inputs: int
    ) -> None:
        x, weight, _ = linear_operands(tokens, inputs)
        x[1, 5] = value
        finite = linear(weight, None, weight_format)(x).isfinite()
        assert not bool(finite[1].any())
        assert bool(finite[[token for token in range(tokens) if token != 1]].all())

    @pytest.mark.skipif(not has_onednn(CPU, torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU")
    def test_layer_with_kernels_leaves_inputs_with_gradients_to_onednn(self) -> None:
        _, weight, bias = (one.bfloat16() for one in linear_operands(1))
        leaf = torch.ones(1, 37, requires_grad=True, dtype=torch.bfloat16)
        linear(weight, bias, KERNELS)(leaf).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, weight.sum(0, keepdim=True), rtol=2**-6, atol=2**-6)

    def test_kernel_keeps_its_own_copy_of_the_weight(self) -> None:
        x, weight, _ = linear_operands(1)
        multiply = linear(weight, None, KERNELS)
        before = multiply(x)
        weight.zero_()
        assert torch.equal(multiply(x), before)

    def test_kernels_are_used_only_on_request(self) -> None:
        weight = torch.zeros(3, 2)
        assert isinstance(linear(weight, None, KERNELS), CompiledLinear)
        assert not isinstance(linear(weight), CompiledLinear | TwoLayoutLinear)


@pytest.mark.parametrize(
    ("weight_format", "dtype", "has_amx", "in_onednn", "two"),
    [
        (KERNELS, torch.float32, False, True, False),
        (KERNELS, torch.bfloat16, True, True, True),
        (KERNELS, torch.bfloat16, False, False, False),
        (INT8_KERNELS, torch.float32, False, True, True),
        (INT8_KERNELS, torch.float32, True, True, False),
        (WeightFormat("int8"), torch.float32, False, True, False),
    ],
)
def test_narrow_weights_are_kept_in_two_layouts_unless_amx_multiplies_them(
    weight_format: WeightFormat,
    dtype: torch.dtype,
    has_amx: bool,
    in_onednn: bool,
    two: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: has_amx)
    monkeypatch.setattr("stitch_server.model.weights.has_onednn", lambda device, dtype: in_onednn)
    assert weight_format.keeps_two_layouts(CPU, dtype) is two


@pytest.mark.parametrize(
    ("weight_format", "dtype", "has_amx", "many"),
    [
        (KERNELS, torch.float32, False, True),
        (KERNELS, torch.bfloat16, True, False),
        (INT8_KERNELS, torch.float32, False, False),
        (INT8_KERNELS, torch.float32, True, True),
    ],
)
def test_kernels_are_faster_for_many_tokens_by_float32_or_in_amx_tiles(
    weight_format: WeightFormat, dtype: torch.dtype, has_amx: bool, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: has_amx)
    packed = pack_panels(quantize(torch.ones(32, 64, dtype=dtype), weight_format)[0])
    panels = (packed.view(torch.uint16) if dtype is torch.bfloat16 else packed).numpy()
    assert [is_faster_for(tokens, panels) for tokens in (1, 16, 17, 1000)] == [True, True, many, many]


def test_bfloat16_on_a_cpu_without_avx512_has_the_plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (one.bfloat16() for one in linear_operands(3))
    monkeypatch.setattr("stitch_server.model.linear.has_onednn", lambda device, dtype: dtype is not torch.bfloat16)
    multiply = linear(weight, bias)
    assert isinstance(multiply, PlainLinear)
    torch.testing.assert_close(multiply(x), torch.nn.functional.linear(x, weight, bias))


def test_float32_is_packed_for_onednn() -> None:
    assert isinstance(linear(torch.zeros(3, 2)), PackedLinear)


def test_float16_stays_in_the_layout_of_pytorch() -> None:
    assert isinstance(linear(torch.zeros(3, 2, dtype=torch.float16)), PlainLinear)


def test_linear_takes_strided_inputs() -> None:
    x, weight, bias = linear_operands(5)
    wide = torch.cat([x, x], dim=1)
    for multiply in layouts(weight, bias):
        torch.testing.assert_close(multiply(wide[:, :37]), multiply(x))


def test_packed_linear_keeps_its_own_copy_of_the_weight() -> None:
    x, weight, _ = linear_operands(3)
    multiply = linear(weight)
    before = multiply(x)
    weight.zero_()
    assert torch.equal(multiply(x), before)


def test_linear_passes_gradients_to_its_input() -> None:
    x, weight, bias = linear_operands(4)
    direction = torch.randn(4, 53)
    for multiply in layouts(weight, bias):
        leaf = x.clone().requires_grad_()
        (multiply(leaf) * direction).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, direction @ weight)


def test_linear_takes_weights_made_in_inference_mode() -> None:
    x, weight, bias = linear_operands(2)
    with torch.inference_mode():
        made = linear(weight.clone(), bias.clone())(x)
    torch.testing.assert_close(made, x @ weight.T + bias)
