"""How functions are compiled for a processor by Numba, and where the result is kept. Compiles nothing itself."""

from __future__ import annotations

from functools import partial

from numba import config, njit

from stitch.environment import compiled_folder

# Once for a machine, where it can be kept.
_folder = compiled_folder()
config.CACHE_DIR = str(_folder or "")  # type: ignore[attr-defined]

# Sums may be taken in any order, which lets them use vector registers. What is not finite stays so, and a division by
# zero is no error.
compiled = partial(
    njit,
    nogil=True,
    cache=_folder is not None,
    error_model="numpy",
    fastmath={"reassoc", "contract", "arcp", "nsz"},
)
