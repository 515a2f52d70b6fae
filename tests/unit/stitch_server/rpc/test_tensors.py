"""Hidden states survive packing, and bytes that contradict their shape are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch.v1 import shard_pb2
from stitch_server.rpc.tensors import DTYPES, Packed, bytes_per_token, pack, unpack

CPU = torch.device("cpu")
EXACT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rows(tokens: int = 5, width: int = 12, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", EXACT)
def test_rows_are_rounded_to_wire_dtype(dtype: str) -> None:
    packed = pack(rows(), DTYPES[dtype][0])
    arrived = unpack(packed, CPU, torch.float32)
    assert torch.equal(arrived, rows().to(EXACT[dtype]).float())
    assert (packed.tokens, packed.width, packed.scales) == (5, 12, b"")


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_rows_have_receivers_dtype(dtype: str) -> None:
    assert unpack(pack(rows(), DTYPES[dtype][0]), CPU, torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_size_is_bytes_per_token(dtype: str) -> None:
    packed = pack(rows(), DTYPES[dtype][0])
    assert len(packed.data) + len(packed.scales) == 5 * bytes_per_token(12, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_pass_check(dtype: str) -> None:
    pack(rows(), DTYPES[dtype][0]).check(12, DTYPES[dtype][0])


def test_bytes_are_little_endian_and_row_major() -> None:
    packed = pack(torch.tensor([[1.0, 2.0], [3.0, -4.0]]), shard_pb2.DTYPE_FLOAT32)
    assert packed.data == np.array([1, 2, 3, -4], dtype="<f4").tobytes()


def test_rows_may_be_strided() -> None:
    assert torch.equal(unpack(pack(rows(12, 5).T, shard_pb2.DTYPE_FLOAT32), CPU, torch.float32), rows(12, 5).T)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_int8_error_is_at_most_half_a_step(scale: float) -> None:
    sent = rows(50, 64, scale)
    arrived = unpack(pack(sent, shard_pb2.DTYPE_INT8), CPU, torch.float32)
    step = sent.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((arrived - sent).abs() <= step * 0.5001).all())


def test_int8_keeps_largest_value_of_row() -> None:
    sent = torch.tensor([[0.4, -127.0, 3.0]])
    assert unpack(pack(sent, shard_pb2.DTYPE_INT8), CPU, torch.float32).tolist() == [[0.0, -127.0, 3.0]]


def test_int8_scales_each_token() -> None:
    sent = torch.tensor([[1e-3, 2e-3], [1e3, 2e3]])
    torch.testing.assert_close(unpack(pack(sent, shard_pb2.DTYPE_INT8), CPU, torch.float32), sent, rtol=0.01, atol=0)


def test_int8_is_rounded_once_for_bfloat16_receiver() -> None:
    sent = rows(20, 32)
    exact = unpack(pack(sent, shard_pb2.DTYPE_INT8), CPU, torch.float32)
    assert torch.equal(unpack(pack(sent, shard_pb2.DTYPE_INT8), CPU, torch.bfloat16), exact.bfloat16())


def test_int8_of_tiny_rows_survives_float16() -> None:
    sent = torch.full((1, 4), 1e-6)
    assert bool((unpack(pack(sent, shard_pb2.DTYPE_INT8), CPU, torch.float16) > 0).all())


def test_int8_of_zeros_is_zeros() -> None:
    assert not unpack(pack(torch.zeros(2, 3), shard_pb2.DTYPE_INT8), CPU, torch.float32).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_non_finite(dtype: str, value: float) -> None:
    sent = rows()
    sent[2, 3] = value
    arrived = unpack(pack(sent, DTYPES[dtype][0]), CPU, torch.float32)
    assert not bool(arrived[2].isfinite().all())
    assert bool(arrived[[0, 1, 3, 4]].isfinite().all())


class TestRefusals:
    PACKED = pack(rows(), shard_pb2.DTYPE_FLOAT32)

    def refused(self, packed: Packed, width: int = 12, dtype: str = "float32") -> InvalidRequest:
        with pytest.raises(InvalidRequest) as caught:
            packed.check(width, DTYPES[dtype][0])
        return caught.value

    def test_other_dtype_is_refused(self) -> None:
        error = self.refused(self.PACKED, dtype="bfloat16")
        assert (error.field, error.value) == ("hidden.dtype", "DTYPE_FLOAT32")
        assert "DTYPE_BFLOAT16" in error.limit

    def test_unknown_dtype_is_refused(self) -> None:
        unknown: shard_pb2.Dtype = 77  # type: ignore[assignment]
        assert self.refused(replace(self.PACKED, dtype=unknown)).value == "77"

    def test_other_width_is_refused(self) -> None:
        error = self.refused(self.PACKED, width=16)
        assert (error.field, error.value) == ("hidden.hidden_size", 12)
        assert "16" in error.limit

    @pytest.mark.parametrize("data", [b"", PACKED.data[:-1], PACKED.data + b"\0"])
    def test_bytes_that_contradict_shape_are_refused(self, data: bytes) -> None:
        error = self.refused(replace(self.PACKED, data=data))
        assert error.field == "hidden.data"
        assert str(len(data)) in str(error.value)
        assert "[5, 12]" in error.limit
        assert str(5 * 12 * 4) in error.limit

    def test_more_tokens_than_bytes_are_refused(self) -> None:
        assert self.refused(replace(self.PACKED, tokens=2**31)).field == "hidden.data"

    def test_unexpected_scales_are_refused(self) -> None:
        assert self.refused(replace(self.PACKED, scales=b"\0" * 20)).field == "hidden.scales"

    @pytest.mark.parametrize("scales", [b"", b"\0" * 19, b"\0" * 24])
    def test_scales_that_contradict_tokens_are_refused(self, scales: bytes) -> None:
        error = self.refused(replace(pack(rows(), shard_pb2.DTYPE_INT8), scales=scales), dtype="int8")
        assert error.field == "hidden.scales"
        assert error.limit == "5 tokens take 20"
