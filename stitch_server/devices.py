"""Which device a shard computes on, and how small things get there. Loads nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from stitch.errors import InvalidRequest


def pick_device(wanted: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the processor.

    Raises InvalidRequest for a GPU that isn't there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("compute.device", wanted, "this machine has no GPU that torch can use")
    return device


def sent(host: Tensor, device: torch.device) -> Tensor:
    """`host` on the device, without waiting for what the device still has to compute.

    From memory that isn't pinned a GPU's driver would wait.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
