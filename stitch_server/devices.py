"""The device of a shard: which one it computes on, and how tensors reach it or a compiled kernel.

`pick_device` turns `compute.device` of the cluster file into a torch device. `to_device_async` copies small host
tensors without synchronizing. `as_bits` and `as_float32` give CPU tensors as the NumPy arrays that kernels read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stitch.errors import InvalidRequest

if TYPE_CHECKING:
    from stitch_server.cpu import Floats, Numbers


def pick_device(wanted: str) -> torch.device:
    """The device named `wanted`; `auto` is the first GPU if the machine has one, else the CPU.

    Raises InvalidRequest if `wanted` is a GPU and torch finds none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("compute.device", wanted, "this machine has no GPU that torch can use")
    return device


def to_device_async(host: Tensor, device: torch.device) -> Tensor:
    """Copies `host` to the device without waiting for the kernels that are queued there.

    From memory that isn't pinned the driver of a GPU would wait.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def as_float32(tensor: Tensor) -> Floats:
    """A CPU tensor as a contiguous float32 array; shares memory if it is one already."""
    array: Floats = tensor.float().contiguous().numpy()
    return array


def as_bits(tensor: Tensor) -> Numbers:
    """A CPU tensor as an array over the same memory; bfloat16 becomes uint16, since NumPy has no such type."""
    array: Numbers = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
