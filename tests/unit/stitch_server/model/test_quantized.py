"""Quantized weights are near the originals, and linear layers without kernels multiply by them."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from torch.nn import functional as F

from stitch.cluster import Quantization
from stitch_server.model.linear import linear
from stitch_server.model.quantized import PackedInt8Linear, PlainInt8Linear, from_int4, to_int4, to_int8
from stitch_server.model.weights import WeightFormat
from tests.support.linear_operands import linear_operands

# Older CPUs overflow in oneDNN's sums of pairs, so shards don't use it there.
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the CPU has no VNNI instructions")


class TestInt8:
    def test_weight_is_near_its_bytes_times_their_scale(self) -> None:
        _, weight, _ = linear_operands(1)
        int8, scales = to_int8(weight)
        assert int8.dtype is torch.int8
        assert int(int8.abs().amax()) == 127
        # Half of a step, and what float32 leaves of it.
        assert bool(((int8 * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all())

    @pytest.mark.parametrize("kind", [pytest.param(PackedInt8Linear, marks=needs_vnni), PlainInt8Linear])
    @pytest.mark.parametrize(("tokens", "biased"), [(0, True), (1, False), (2, True), (33, False), (200, True)])
    def test_linear_errs_by_at_most_two_percent(self, kind: type[PackedInt8Linear], tokens: int, biased: bool) -> None:
        x, weight, bias = linear_operands(tokens)
        # Tokens of very different sizes do not share a scale.
        x = x * torch.logspace(-3, 3, tokens)[:, None]
        exact = F.linear(x, weight)
        got = kind.quantized(weight, bias if biased else None)(x) - (bias if biased else 0.0)
        assert got.shape == exact.shape
        error = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert bool((error < 0.02).all())

    @pytest.mark.parametrize("kind", [PackedInt8Linear, PlainInt8Linear])
    def test_token_of_zeros_returns_the_bias(self, kind: type[PackedInt8Linear]) -> None:
        _, weight, bias = linear_operands(1)
        torch.testing.assert_close(kind.quantized(weight, bias)(torch.zeros(2, 37)), bias.expand(2, -1))

    def test_output_of_zero_weights_is_zero(self) -> None:
        x, weight, _ = linear_operands(3)
        weight[5] = 0.0
        assert bool((linear(weight, None, WeightFormat("int8"))(x)[:, 5] == 0).all())

    def test_linear_takes_strided_inputs(self) -> None:
        x, weight, bias = linear_operands(5)
        wide, multiply = torch.cat([x, x], dim=1), linear(weight, bias, WeightFormat("int8"))
        assert torch.equal(multiply(wide[:, :37]), multiply(x))

    def test_linear_keeps_the_dtype_of_its_input(self) -> None:
        x, weight, bias = linear_operands(5)
        multiply = linear(weight.bfloat16(), bias.bfloat16(), WeightFormat("int8"))
        assert multiply(x.bfloat16()).dtype is torch.bfloat16

    def test_cpu_without_vnni_uses_the_plain_layout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert isinstance(linear(torch.zeros(3, 2), None, WeightFormat("int8")), PlainInt8Linear)


class TestInt4:
    @pytest.mark.parametrize("inputs", [32, 37, 96])
    def test_weight_errs_by_at_most_half_a_step_of_its_group(self, inputs: int) -> None:
        _, weight, _ = linear_operands(1, inputs)
        near = from_int4(to_int4(weight))[:, :inputs]
        for mine, theirs in zip(weight.split(32, dim=1), near.split(32, dim=1), strict=True):
            # A padded group has zeros, too. Steps and least weights are rounded to eleven bits.
            most = mine.amax(dim=1).clamp_min(0) - mine.amin(dim=1).clamp_max(0)
            assert bool(((theirs - mine).abs() <= (most / 30 + most * 2**-9)[:, None]).all())

    def test_weights_of_q4_1_are_kept_exactly(self) -> None:
        (_, weight, _), kind = linear_operands(1, 256), GGMLQuantizationType.Q4_1
        stored = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
        assert torch.equal(from_int4(to_int4(stored)), stored)

    def test_group_of_zeros_stays_zero(self) -> None:
        _, weight, _ = linear_operands(1, 64)
        weight[3, 32:] = 0.0
        assert bool((from_int4(to_int4(weight))[3, 32:] == 0).all())

    @pytest.mark.parametrize("tokens", [0, 1, 50])
    def test_linear_without_kernels_returns_the_matmul(self, tokens: int) -> None:
        x, weight, bias = linear_operands(tokens)
        near = from_int4(to_int4(weight))[:, :37]
        torch.testing.assert_close(linear(weight, bias, WeightFormat("int4"))(x), F.linear(x, near, bias))

    def test_linear_keeps_the_dtype_of_its_input(self) -> None:
        x, weight, bias = (one.bfloat16() for one in linear_operands(5))
        for kernels in (False, True):
            assert linear(weight, bias, WeightFormat("int4", kernels))(x).dtype is torch.bfloat16


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_rounded_weights_multiply_as_the_quantized_ones(quantization: Quantization) -> None:
    x, weight, bias = linear_operands(5, 96)
    dense = linear(weight, bias, WeightFormat(quantization, is_rounded=True))
    # The kernels' layout quantizes weights alone; so does the plain one.
    plain = {"none": F.linear, "int8": _by_int8, "int4": _by_int4}[quantization](x, weight, bias)
    torch.testing.assert_close(dense(x), plain)


def _by_int8(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    int8, scales = to_int8(weight)
    return (x @ int8.float().T) * scales + bias


def _by_int4(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x @ from_int4(to_int4(weight))[:, : weight.shape[1]].T + bias
