"""The decorator by which Numba compiles the kernels, and the folder that keeps the compiled code."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from numba import config, njit

from stitch.environment import compiled_folder


def _sources() -> str:
    """A hash of all modules of this package. Numba itself checks only a function's own file for changes."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# Compiled once a machine, where the result can be kept.
_folder = compiled_folder()
config.CACHE_DIR = "" if _folder is None else str(_folder / _sources())  # type: ignore[attr-defined]

# Kernels copy element by element, never slice to slice: such an assignment can fail, and the code that formats its
# error would be compiled again in every caller (docs/decisions/0028).
#
# Sums may be taken in any order, which lets them use vector registers. Non-finite values stay non-finite, and a
# division by zero is no error.
compiled = partial(
    njit,
    nogil=True,
    cache=_folder is not None,
    error_model="numpy",
    fastmath={"reassoc", "contract", "arcp", "nsz"},
)
