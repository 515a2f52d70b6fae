"""What this processor can do that others can't. Knows no array."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

import llvmlite.binding as llvm

# Linux gives a process the registers of tiles if it asks.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def knows_tiles() -> bool:
    """Whether it has AMX, which multiplies tiles of bfloat16 and of bytes."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-bf16") and features.get("amx-int8"))


@cache
def knows_dots() -> bool:
    """Whether it adds four products of bytes at once, in wide vectors."""
    return bool(llvm.get_host_cpu_features().get("avx512vnni"))


@cache
def has_tiles() -> bool:
    """Whether it has AMX and this process may use it."""
    if not knows_tiles() or platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)
