"""Which optional instructions this CPU has. Imports neither Numba nor any array."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm

# Linux gives a process the AMX tile registers on request.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def has_amx_instructions() -> bool:
    """Whether the CPU has AMX, which multiplies tiles of bfloat16 and of int8."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-bf16") and features.get("amx-int8"))


@cache
def has_amx() -> bool:
    """Whether the CPU has AMX and the operating system lets this process use it."""
    if not has_amx_instructions() or platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@cache
def has_vnni() -> bool:
    """Whether the CPU has AVX512-VNNI, which adds four products of int8 at once."""
    return bool(llvm.get_host_cpu_features().get("avx512vnni"))


class Instructions(NamedTuple):
    """The optional instructions that a matmul may use, beside vectors."""

    amx: bool
    vnni: bool
