"""The device that training computes on: models, sums and optimizers live there; traces and drawn numbers on the CPU."""

from __future__ import annotations

import torch

from stitch.errors import InvalidRequest

CPU = torch.device("cpu")
# Sequences that pass a model together. Sums add them batch by batch, so the number decides their last digits.
CPU_BATCH_SEQUENCES, GPU_BATCH_SEQUENCES = 4, 16
# Prompts that are answered together.
CPU_BATCH_PROMPTS, GPU_BATCH_PROMPTS = 16, 64


def training_device(name: str) -> torch.device:
    """Returns the device of that name: `cpu`, `cuda` or `cuda:N`.

    Raises InvalidRequest where it has another form, or torch sees no such device.
    """
    kind, colon, index = name.partition(":")
    if name == "cpu":
        return CPU
    if kind != "cuda" or (colon and not (index.isascii() and index.isdecimal())):
        raise InvalidRequest("device", name, "it must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise InvalidRequest("device", name, f"torch sees {count} CUDA devices on this machine")
    return torch.device(kind, int(index or 0))


def batch_sequences(device: torch.device) -> int:
    """Returns the number of sequences that pass a model together."""
    return CPU_BATCH_SEQUENCES if device.type == "cpu" else GPU_BATCH_SEQUENCES


def batch_prompts(device: torch.device) -> int:
    """Returns the number of prompts that are answered together."""
    return CPU_BATCH_PROMPTS if device.type == "cpu" else GPU_BATCH_PROMPTS
