"""The CPU kernels, compiled by Numba: matmuls, attention, whole decoder layers. Arrays in and out, no PyTorch.

This module is the package's only interface; every name is loaded on first use, since Numba takes a second to import.
`layers.py` takes a batch through all layers of a shard in one call. It calls `matmul/` and `attention/`, each with a
`dispatch.py` that chooses among the kernels beside it. `tasks.py` shares the work of a call among threads, and
`simd.py` emits the instructions that no compiler would choose from Python.

A matmul of a few tokens (decode) is bound by reading the matrix, and packed panels (`matmul/panels.py`) are read at the
memory's full speed, which a library's kernels for many tokens don't reach. A matmul of many tokens (prefill) is bound
by arithmetic, which AMX tiles (`matmul/float32.py`, `matmul/int8.py`) do fastest. Between its matmuls a layer does so
little that a call for each step, or even for each layer, costs more than the step. And a library's attention wants the
keys and values of each sequence contiguous; these kernels read them in their blocks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stitch_server.cpu.attention.dispatch import PagedKV, attend_shared, slot_mapping, store_all_kv
    from stitch_server.cpu.features import Instructions, has_amx, has_vnni
    from stitch_server.cpu.layers import Activations, Layers, Pass, RowAdapters, run_layers
    from stitch_server.cpu.matmul.dispatch import matmul_shared
    from stitch_server.cpu.matmul.int4_layout import (
        INT4_BITS_PER_GROUP,
        INT4_GROUP,
        INT4_MAX_STEPS,
        INT4_SHIFTS,
        INT4_WORD_INPUTS,
        INT4_WORDS,
    )
    from stitch_server.cpu.matmul.int8 import INT8_TILE_INPUTS, MAX_INT8_INPUTS
    from stitch_server.cpu.matmul.panels import PANEL_OUTPUTS, Matrix
    from stitch_server.cpu.scalars import Floats, Indices, Numbers
    from stitch_server.cpu.simd import TILE_SIDE
    from stitch_server.cpu.tasks import new_task_counts

__all__ = [
    "INT4_BITS_PER_GROUP",
    "INT4_GROUP",
    "INT4_MAX_STEPS",
    "INT4_SHIFTS",
    "INT4_WORDS",
    "INT4_WORD_INPUTS",
    "INT8_TILE_INPUTS",
    "MAX_INT8_INPUTS",
    "PANEL_OUTPUTS",
    "TILE_SIDE",
    "Activations",
    "Floats",
    "Indices",
    "Instructions",
    "Layers",
    "Matrix",
    "Numbers",
    "PagedKV",
    "Pass",
    "RowAdapters",
    "attend_shared",
    "has_amx",
    "has_vnni",
    "matmul_shared",
    "new_task_counts",
    "run_layers",
    "slot_mapping",
    "store_all_kv",
]

_MODULES = {
    "attention.dispatch": ("PagedKV", "attend_shared", "slot_mapping", "store_all_kv"),
    "features": ("Instructions", "has_amx", "has_vnni"),
    "layers": ("Activations", "Layers", "Pass", "RowAdapters", "run_layers"),
    "matmul.dispatch": ("matmul_shared",),
    "matmul.int4_layout": (
        "INT4_BITS_PER_GROUP",
        "INT4_GROUP",
        "INT4_MAX_STEPS",
        "INT4_SHIFTS",
        "INT4_WORDS",
        "INT4_WORD_INPUTS",
    ),
    "matmul.int8": ("INT8_TILE_INPUTS", "MAX_INT8_INPUTS"),
    "matmul.panels": ("PANEL_OUTPUTS", "Matrix"),
    "scalars": ("Floats", "Indices", "Numbers"),
    "simd": ("TILE_SIDE",),
    "tasks": ("new_task_counts",),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports the module of a public name when the name is first used."""
        for module, names in _MODULES.items():
            if name in names:
                value = getattr(import_module(f"{__name__}.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
