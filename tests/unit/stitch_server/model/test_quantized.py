"""Quantized weights are near what they were, and without kernels linear layers compute with what they are now."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from torch.nn import functional as F

from stitch_server.model.linear import WeightFormat, linear
from stitch_server.model.quantized import PackedInt8Linear, PlainInt8Linear, from_int4, to_int4, to_int8
from tests.support.operands import operands


class TestInt8:
    def test_a_weight_is_its_bytes_times_their_scale(self) -> None:
        _, weight, _ = operands(1)
        rows, scales = to_int8(weight)
        assert (rows.dtype, rows.abs().amax()) == (torch.int8, 127)
        # Half of a step, and what float32 leaves of it.
        assert bool(((rows * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all())

    @pytest.mark.parametrize("kind", [PackedInt8Linear, PlainInt8Linear])
    @pytest.mark.parametrize("rows", [0, 1, 2, 8, 33, 200])
    @pytest.mark.parametrize("biased", [True, False])
    def test_is_the_product_but_for_a_percent(self, kind: type[PackedInt8Linear], rows: int, biased: bool) -> None:
        x, weight, bias = operands(rows)
        # Rows of very different sizes do not share a scale.
        x = x * torch.logspace(-3, 3, rows)[:, None]
        exact = F.linear(x, weight)
        got = kind.quantized(weight, bias if biased else None)(x) - (bias if biased else 0.0)
        assert got.shape == exact.shape
        error = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert bool((error < 0.02).all())

    @pytest.mark.parametrize("kind", [PackedInt8Linear, PlainInt8Linear])
    def test_a_row_of_zeros_is_the_bias(self, kind: type[PackedInt8Linear]) -> None:
        _, weight, bias = operands(1)
        torch.testing.assert_close(kind.quantized(weight, bias)(torch.zeros(2, 37)), bias.expand(2, -1))

    def test_an_output_without_weights_is_zero(self) -> None:
        x, weight, _ = operands(3)
        weight[5] = 0.0
        assert bool((linear(weight, None, WeightFormat("int8"))(x)[:, 5] == 0).all())

    def test_takes_rows_that_lie_apart(self) -> None:
        x, weight, bias = operands(5)
        wide, multiply = torch.cat([x, x], dim=1), linear(weight, bias, WeightFormat("int8"))
        assert torch.equal(multiply(wide[:, :37]), multiply(x))

    def test_keeps_the_dtype_of_the_rows(self) -> None:
        x, weight, bias = operands(5)
        multiply = linear(weight.bfloat16(), bias.bfloat16(), WeightFormat("int8"))
        assert multiply(x.bfloat16()).dtype is torch.bfloat16

    def test_processors_without_the_instructions_stay_plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert isinstance(linear(torch.zeros(3, 2), None, WeightFormat("int8")), PlainInt8Linear)


class TestInt4:
    @pytest.mark.parametrize("inputs", [32, 37, 96])
    def test_a_weight_is_near_by_half_a_step_of_its_group(self, inputs: int) -> None:
        _, weight, _ = operands(1, inputs)
        near = from_int4(to_int4(weight))[:, :inputs]
        for mine, theirs in zip(weight.split(32, dim=1), near.split(32, dim=1), strict=True):
            # A group that is filled up has zeros, too. Steps and least weights are rounded to eleven bits.
            most = mine.amax(dim=1).clamp_min(0) - mine.amin(dim=1).clamp_max(0)
            assert bool(((theirs - mine).abs() <= (most / 30 + most * 2**-9)[:, None]).all())

    def test_what_was_stored_in_four_bits_is_kept(self) -> None:
        (_, weight, _), kind = operands(1, 256), GGMLQuantizationType.Q4_1
        stored = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
        assert torch.equal(from_int4(to_int4(stored)), stored)

    def test_groups_without_weights_are_zero(self) -> None:
        _, weight, _ = operands(1, 64)
        weight[3, 32:] = 0.0
        assert bool((from_int4(to_int4(weight))[3, 32:] == 0).all())

    @pytest.mark.parametrize("rows", [0, 1, 50])
    def test_without_kernels_it_is_the_product(self, rows: int) -> None:
        x, weight, bias = operands(rows)
        near = from_int4(to_int4(weight))[:, :37]
        torch.testing.assert_close(linear(weight, bias, WeightFormat("int4"))(x), F.linear(x, near, bias))

    def test_keeps_the_dtype_of_the_rows(self) -> None:
        x, weight, bias = (one.bfloat16() for one in operands(5))
        for kernels in (False, True):
            assert linear(weight, bias, WeightFormat("int4", kernels))(x).dtype is torch.bfloat16
