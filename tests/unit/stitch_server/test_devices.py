"""The device is picked or refused before anything is loaded; arrays for kernels share memory with tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stitch.errors import InvalidRequest
from stitch_server.devices import as_bits, as_float32, pick_device, to_device_async


def test_auto_picks_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device("auto").type == wanted


def test_missing_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match=r"compute\.device is 'cuda:1', but this machine has no GPU"):
        pick_device("cuda:1")
    assert pick_device("cpu").type == "cpu"


def test_tensor_for_the_cpu_is_not_copied() -> None:
    positions = torch.arange(3)
    assert to_device_async(positions, torch.device("cpu")) is positions


def test_bits_of_bfloat16_share_its_memory_as_uint16() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    bits = as_bits(tensor)
    assert bits.dtype == np.uint16
    bits[1] = 0
    assert tensor.tolist() == [1.0, 0.0, 1.0]


def test_float32_array_is_contiguous_and_copied_only_when_needed() -> None:
    tensor = torch.randn(4, 6)
    assert np.shares_memory(as_float32(tensor), tensor.numpy())
    strided = as_float32(tensor.bfloat16()[:, ::2])
    assert (strided.dtype, strided.flags.c_contiguous, strided.shape) == (np.float32, True, (4, 3))
