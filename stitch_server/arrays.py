"""Tensors as kernels take them. Computes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from stitch_server.cpu.scalars import Floats, Numbers


def floats(rows: Tensor) -> Floats:
    """As contiguous float32; not a copy where it is that already."""
    array: Floats = rows.float().contiguous().numpy()
    return array


def numbers(tensor: Tensor) -> Numbers:
    """The same memory; of bfloat16 the bits."""
    array: Numbers = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
