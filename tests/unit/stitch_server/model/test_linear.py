"""Both layouts of a matrix give the same product, exactly to float32's last digits, and the same gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stitch_server import cpu
from stitch_server.model import compiled_linear
from stitch_server.model.compiled_linear import CompiledLinear
from stitch_server.model.linear import (
    Linear,
    PackedLinear,
    PlainLinear,
    TwoLayoutLinear,
    WeightFormat,
    linear,
)
from stitch_server.model.quantized import from_int4, to_int4, to_int8
from tests.support.operands import operands

KERNELS, INT8_KERNELS, INT4_KERNELS = (
    WeightFormat(kernels=True),
    WeightFormat("int8", kernels=True),
    WeightFormat("int4", kernels=True),
)


@pytest.fixture
def has_amx() -> None:
    if not cpu.has_amx():
        pytest.skip("this processor has no AMX")


@pytest.fixture
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: False)


def layouts(weight: Tensor, bias: Tensor | None) -> list[Linear]:
    return [linear(weight, bias), PlainLinear(weight, bias)]


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 33, 200])
@pytest.mark.parametrize("biased", [True, False])
def test_is_the_product(rows: int, biased: bool) -> None:
    x, weight, bias = operands(rows)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
    for multiply in layouts(weight, bias if biased else None):
        torch.testing.assert_close(multiply(x).double(), exact, rtol=1e-5, atol=1e-5)


def assert_is_by_bytes(rows: int, inputs: int, biased: bool) -> None:
    """Rows stay as they are, to float32's last digits."""
    x, weight, bias = operands(rows, inputs)
    kept, scales = to_int8(weight)
    exact = x.double() @ (kept.double() * scales.double()[:, None]).T + (bias.double() if biased else 0.0)
    got = linear(weight, bias if biased else None, INT8_KERNELS)(x)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.fixture(params=[True, False])
def dots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bytes are multiplied in vectors."""
    if request.param and not cpu.has_vnni():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(cpu, "has_vnni", lambda: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("_threads")
class TestKernels:
    # The last panel is filled up; inputs are one block in the cache, several, and several of tiles.
    @pytest.fixture(params=[37, 400, 1200])
    def inputs(self, request: pytest.FixtureRequest) -> int:
        length: int = request.param
        return length

    @pytest.mark.parametrize("rows", [0, 1, 2, 3, 12, 13, 23, 24, 33, 49, 500])
    @pytest.mark.parametrize("biased", [True, False])
    def test_is_the_product(self, inputs: int, rows: int, biased: bool) -> None:
        x, weight, bias = operands(rows, inputs)
        exact = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
        kept = linear(weight, bias if biased else None, KERNELS)
        torch.testing.assert_close(kept(x).double(), exact, rtol=1e-5, atol=1e-4)

    def test_tiles_are_as_exact_as_vectors(self, inputs: int, has_amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight, _ = operands(128, inputs)
        exact = x.double() @ weight.double().T
        tiled = linear(weight, None, KERNELS)(x)
        monkeypatch.setattr(cpu, "has_amx", lambda: False)
        vectors = linear(weight, None, KERNELS)(x)
        assert not torch.equal(tiled, vectors)
        assert (tiled - exact).square().mean() <= 1.1 * (vectors - exact).square().mean()

    @pytest.mark.parametrize("rows", [1, 4, 6])
    def test_is_the_product_in_bfloat16(self, inputs: int, rows: int) -> None:
        x, weight, bias = (one.bfloat16() for one in operands(rows, inputs))
        got = linear(weight, bias, KERNELS)(x)
        assert got.dtype is torch.bfloat16
        exact = x.double() @ weight.double().T + bias.double()
        # A bfloat16 has eight bits; the bias is added to one.
        torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-6)

    @pytest.mark.parametrize("rows", [0, 1, 2, 4, 7, 16])
    @pytest.mark.parametrize("biased", [True, False])
    @pytest.mark.usefixtures("no_tiles")
    def test_bytes_are_multiplied_by_whole_rows(self, inputs: int, rows: int, biased: bool) -> None:
        assert_is_by_bytes(rows, inputs, biased)

    # One tile of lines, several, and more than go together.
    @pytest.mark.parametrize("rows", [0, 1, 5, 6, 10, 11, 33, 100, 290, 500])
    @pytest.mark.parametrize("biased", [True, False])
    def test_in_tiles_so_are_any_number_of_rows(self, inputs: int, rows: int, biased: bool, has_amx: None) -> None:
        assert_is_by_bytes(rows, inputs, biased)

    @pytest.mark.parametrize("largest", [1e-35, 1e-20, 1e4, 1e30])
    def test_a_row_is_as_exact_as_its_largest_number(self, inputs: int, largest: float, has_amx: None) -> None:
        x, weight, _ = operands(3, inputs)
        x[1] *= largest / x[1].abs().max()
        x[2, 7] = largest
        kept, scales = to_int8(weight)
        weight = kept.double() * scales.double()[:, None]
        errors = (linear(weight.float(), None, INT8_KERNELS)(x).double() - x.double() @ weight.T).abs()
        limits = x.double().abs().amax(dim=1) * weight.abs().sum(dim=1).max() * 2**-23 + 1e-30
        assert bool((errors <= limits[:, None]).all())

    # One row, several and more than go together, many, and those in tiles.
    @pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 13, 23, 24, 40, 200])
    @pytest.mark.parametrize("biased", [True, False])
    def test_in_four_bits_it_is_the_product_too(self, inputs: int, rows: int, biased: bool, dots: bool) -> None:
        x, weight, bias = operands(rows, inputs)
        exact = x.double() @ from_int4(to_int4(weight))[:, :inputs].double().T + (bias.double() if biased else 0.0)
        got = linear(weight, bias if biased else None, INT4_KERNELS)(x)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("rows", [1, 3, 13, 23, 24, 40, 200])
    def test_widened_it_is_that_of_float32(self, inputs: int, rows: int, dots: bool) -> None:
        """To the last bit; by digits it is as exact, of short sums nearly so."""
        x, weight, bias = operands(rows, inputs)
        near = from_int4(to_int4(weight))[:, :inputs].contiguous()
        got, expected = linear(weight, bias, INT4_KERNELS)(x), linear(near, bias, KERNELS)(x)
        if not dots or compiled_linear.instructions(rows).amx:
            assert torch.equal(got, expected)
        else:
            exact = x.double() @ near.double().T + bias.double()
            assert not torch.equal(got, expected)
            assert (got - exact).square().mean() <= 4 * (expected - exact).square().mean()

    def test_bytes_for_more_inputs_than_sums_have_room_for_are_refused(self, has_amx: None) -> None:
        with pytest.raises(ValueError, match="131073 inputs, the most are 131072"):
            linear(torch.zeros(1, 131073), None, INT8_KERNELS)

    @pytest.mark.parametrize("rows", [17, 40])
    @pytest.mark.usefixtures("no_tiles")
    def test_elsewhere_bytes_for_many_rows_are_those_without_copies(self, inputs: int, rows: int) -> None:
        x, weight, bias = operands(rows, inputs)
        assert torch.equal(linear(weight, bias, INT8_KERNELS)(x), linear(weight, bias, WeightFormat("int8"))(x))

    def test_bytes_keep_the_dtype_of_the_rows(self) -> None:
        x, weight, bias = (one.bfloat16() for one in operands(1))
        assert linear(weight, bias, INT8_KERNELS)(x).dtype is torch.bfloat16

    @pytest.mark.parametrize("weight_format", [KERNELS, INT8_KERNELS, INT4_KERNELS])
    def test_a_row_is_the_same_in_any_company(self, inputs: int, weight_format: WeightFormat) -> None:
        """To the last bit: so answers don't depend on who else is served."""
        x, weight, bias = operands(16, inputs)
        kept = linear(weight, bias, weight_format)
        together = kept(x)
        for first in range(16):
            for end in range(first + 1, 17):
                assert torch.equal(kept(x[first:end]), together[first:end])

    @pytest.mark.parametrize(("weight_format", "fewest"), [(KERNELS, 24), (INT8_KERNELS, 1), (INT4_KERNELS, 24)])
    def test_a_row_is_the_same_in_any_crowd(
        self, inputs: int, weight_format: WeightFormat, fewest: int, has_amx: None
    ) -> None:
        x, weight, bias = operands(200, inputs)
        kept = linear(weight, bias, weight_format)
        together = kept(x)
        for first, end in ((0, fewest), (1, 1 + fewest), (7, 120), (100, 200), (150, 199)):
            assert torch.equal(kept(x[first:end]), together[first:end])

    @pytest.mark.parametrize(("rows", "few"), [(1, True), (16, True), (17, False)])
    def test_bfloat16_is_theirs_for_few_rows(self, inputs: int, rows: int, few: bool) -> None:
        kept = linear(torch.ones(3, inputs, dtype=torch.bfloat16), None, KERNELS)
        assert isinstance(kept, TwoLayoutLinear)
        marked = replace(kept, many=torch.zeros_like)
        assert bool((marked(torch.ones(rows, inputs, dtype=torch.bfloat16)) == inputs).all()) is few

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("weight_format", [KERNELS, INT8_KERNELS, INT4_KERNELS])
    @pytest.mark.parametrize("rows", [2, 6, 50])
    def test_what_is_not_finite_stays_so(
        self, inputs: int, value: float, weight_format: WeightFormat, rows: int
    ) -> None:
        x, weight, _ = operands(rows, inputs)
        x[1, 5] = value
        finite = linear(weight, None, weight_format)(x).isfinite()
        assert not bool(finite[1].any())
        assert bool(finite[[row for row in range(rows) if row != 1]].all())

    def test_takes_what_wants_gradients_elsewhere(self) -> None:
        _, weight, bias = (one.bfloat16() for one in operands(1))
        leaf = torch.ones(1, 37, requires_grad=True, dtype=torch.bfloat16)
        linear(weight, bias, KERNELS)(leaf).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, weight.sum(0, keepdim=True), rtol=2**-6, atol=2**-6)

    def test_keeps_its_own_copy(self) -> None:
        x, weight, _ = operands(1)
        kept = linear(weight, None, KERNELS)
        before = kept(x)
        weight.zero_()
        assert torch.equal(kept(x), before)

    @pytest.mark.parametrize(("tiles", "kind"), [(True, CompiledLinear), (False, TwoLayoutLinear)])
    def test_are_for_those_who_ask_for_them(self, tiles: bool, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.zeros(3, 2)
        monkeypatch.setattr(cpu, "has_amx", lambda: tiles)
        assert isinstance(linear(weight, None, KERNELS), CompiledLinear)
        assert isinstance(linear(weight, None, INT8_KERNELS), kind)
        assert isinstance(linear(weight, None, INT4_KERNELS), CompiledLinear)
        assert not isinstance(linear(weight), CompiledLinear | TwoLayoutLinear)


def test_a_processor_packs_float32() -> None:
    assert isinstance(linear(torch.zeros(3, 2)), PackedLinear)


def test_what_cannot_be_packed_stays_plain() -> None:
    assert isinstance(linear(torch.zeros(3, 2, dtype=torch.float16)), PlainLinear)


def test_takes_rows_that_lie_apart() -> None:
    x, weight, bias = operands(5)
    wide = torch.cat([x, x], dim=1)
    for multiply in layouts(weight, bias):
        torch.testing.assert_close(multiply(wide[:, :37]), multiply(x))


def test_keeps_its_own_copy_of_what_it_packs() -> None:
    x, weight, _ = operands(3)
    multiply = linear(weight)
    before = multiply(x)
    weight.zero_()
    assert torch.equal(multiply(x), before)


def test_passes_gradients_on() -> None:
    x, weight, bias = operands(4)
    direction = torch.randn(4, 53)
    for multiply in layouts(weight, bias):
        leaf = x.clone().requires_grad_()
        (multiply(leaf) * direction).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, direction @ weight)


def test_works_on_what_inference_mode_made() -> None:
    x, weight, bias = operands(2)
    with torch.inference_mode():
        made = linear(weight.clone(), bias.clone())(x)
    torch.testing.assert_close(made, x @ weight.T + bias)
