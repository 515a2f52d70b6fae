"""Which device a shard computes on. Loads nothing."""

from __future__ import annotations

import torch


def pick_device(wanted: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the processor."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)
