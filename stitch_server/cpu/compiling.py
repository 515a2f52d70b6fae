"""The decorator by which Numba compiles the kernels, and the folder that keeps the compiled code.

Code is compiled once a machine where the folder can be kept: by the first process that needs it, for every copy of the
same sources. The others wait for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from numba import config, njit
from numba.core.caching import UserProvidedCacheLocator
from numba.core.compiler_lock import global_compiler_lock

from stitch.environment import compiled_folder

Function = TypeVar("Function", bound=Callable[..., Any])

_PACKAGE = Path(__file__).parent


def _sources() -> str:
    """A hash of all modules of this package. Numba itself checks only a function's own file for changes."""
    files = sorted(_PACKAGE.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


class PackageLocator(UserProvidedCacheLocator):
    """Keeps the code of a module by its place in this package, wherever the package is."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        file = Path(py_file)
        if file.is_relative_to(_PACKAGE):
            return str(file.relative_to(_PACKAGE).with_suffix(""))
        return str(super().get_suitable_cache_subpath(py_file))  # type: ignore[no-untyped-call]


_folder = compiled_folder()
if _folder is not None:
    _folder /= _sources()
    config.CACHE_DIR = str(_folder)  # type: ignore[attr-defined]
    config.CACHE_LOCATOR_CLASSES = f"{__name__}.{PackageLocator.__name__}"  # type: ignore[attr-defined]


_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": _folder is not None,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Compiles a function for the types of its arguments, when it is called with them for the first time.

    Kernels copy element by element, never slice to slice: such an assignment can fail, and the code that formats its
    error would be compiled again in every caller (docs/decisions/0028).

    Sums may be taken in any order, which lets them use vector registers. Non-finite values stay non-finite, and a
    division by zero is no error.
    """
    make = njit(**_OPTIONS | options)

    def decorated(function: Function) -> Function:
        dispatcher: Any = make(function)
        if _folder is not None:
            file = _folder / f"{function.__module__}.{function.__qualname__}.lock"
            dispatcher.compile = _one_process_at_a_time(dispatcher.compile, FileLock(file))
        return dispatcher  # type: ignore[no-any-return]

    return decorated


def _one_process_at_a_time(compile_function: Callable[[Any], Any], lock: FileLock) -> Callable[[Any], Any]:
    """Numba's method, which loads what another process has compiled meanwhile.

    Two processes that compile one function for other types at the same time could take each other's code. A function's
    lock is taken inside of its callers' and Numba's own, so no two processes wait for each other.
    """

    def compile_alone(signature: Any) -> Any:
        with global_compiler_lock, lock:
            return compile_function(signature)

    return compile_alone
