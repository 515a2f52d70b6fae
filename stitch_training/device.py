"""The device that training computes on: models, sums and optimizers live there; traces and drawn numbers on the CPU."""

from __future__ import annotations

import ctypes
import sys

import torch

from stitch.errors import InvalidRequest

CPU = torch.device("cpu")
# Sequences that pass a model together. Sums add them batch by batch, so the number decides their last digits.
CPU_BATCH_SEQUENCES, GPU_BATCH_SEQUENCES = 4, 16
# Prompts that are answered together.
CPU_BATCH_PROMPTS, GPU_BATCH_PROMPTS = 16, 64
# Parameters of glibc's `mallopt` (malloc.h), and what it is told.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT, _GIBIBYTE = (1 << 31) - 1, 1 << 30


def keep_freed_memory() -> None:
    """Makes this process keep the memory of freed tensors for the next ones, where the C library is glibc.

    By default glibc maps anything over 32 MiB anew, and gives freed memory back: a step of training then spends most of
    its time on page faults. The process stays as large as it has ever been.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _GIBIBYTE)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)


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
