"""Runs a function's doctests on code that a model has written, as a program of its own: `sandbox.py` starts it.

Reads one JSON object from standard input: `module` and `name` of a function of the standard library, or a `header` with
the imports of one that has no module, its `doc`, the `code` to test (none: the library's own), the limits, and a
`passed` text, which is printed where every example passes.
Before the code runs the process gives up what the code must not have: after `confine` it can compute, read files and
write to its open files, up to a size; the kernel refuses all other system calls. It imports the standard library alone.
"""

from __future__ import annotations

import ast
import ctypes
import doctest
import errno
import importlib
import json
import resource
import struct
import sys
from pathlib import Path
from typing import Any

# System calls of Linux on x86-64 that computing and reading need: memory, time, random numbers, signals of its own,
# files that are open already or opened to be read.
_ALLOWED = (
    *(0, 1, 3, 4, 5, 6, 8),  # read, write, close, stat, fstat, lstat, lseek
    *(9, 10, 11, 12, 25, 28),  # mmap, mprotect, munmap, brk, mremap, madvise
    *(13, 14, 15, 131),  # rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack
    *(17, 21, 32, 72, 79, 89, 217, 262, 267, 332),  # pread64, access, dup, fcntl, getcwd, readlink, getdents64, *stat*
    *(24, 35, 96, 202, 228, 229, 230),  # sched_yield, nanosleep, gettimeofday, futex, clock_*
    *(39, 63, 102, 104, 107, 108, 186),  # getpid, uname, get*id
    *(60, 231, 318, 334),  # exit, exit_group, getrandom, rseq
)
_OPENAT = 257
# Any of O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and O_TMPFILE.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
_ARCHITECTURE = 0xC000003E
# Offsets in the kernel's `struct seccomp_data`.
_NUMBER_AT, _ARCHITECTURE_AT, _THIRD_ARGUMENT_AT = 0, 4, 32
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2


def confine(limits: dict[str, int]) -> None:
    """Sets resource limits by their names and installs the filter of system calls. Raises OSError where it can't."""
    for name, value in limits.items():
        number = getattr(resource, name)
        _, most = resource.getrlimit(number)
        least = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(number, (least, least))
    program = _filter()
    instructions = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _filter() -> bytes:
    """Returns a program of the classic Berkeley Packet Filter, eight bytes an instruction."""
    steps = [(_LOAD, 0, 0, _ARCHITECTURE_AT), (_EQUAL, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _KILL)]
    steps.append((_LOAD, 0, 0, _NUMBER_AT))
    for number in _ALLOWED:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    steps += [(_EQUAL, 0, 3, _OPENAT), (_LOAD, 0, 0, _THIRD_ARGUMENT_AT), (_ANY_BIT, 1, 0, _WRITING)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def imports_of(source: str) -> dict[str, Any]:
    """Returns the names that a module's import statements give."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            try:
                exec(compile(ast.Module([node], []), "<imports>", "exec"), names)
            except ImportError:
                continue
    return names


def library_names(module_name: str) -> tuple[dict[str, Any], Any]:
    """Returns what a module's import statements give, and the module itself, which can't be imported any more."""
    module = importlib.import_module(module_name)
    names = imports_of(Path(module.__file__ or "").read_text(encoding="utf-8"))
    # The code must not call what it should be.
    sys.modules[module_name] = None  # type: ignore[assignment]
    return names, module


def main() -> int:
    task = json.loads(sys.stdin.read())
    name, code = task["name"], task["code"]
    names, module = library_names(task["module"]) if task["module"] else ({}, None)
    confine(task["limits"])
    try:
        if module is None:
            names = imports_of(task["header"])
        if code is None:
            names[name] = getattr(module, name)
        else:
            exec(compile(code, "<answer>", "exec"), names)
        test = doctest.DocTestParser().get_doctest(task["doc"], names, name, None, None)
        results = doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None, clear_globs=False)
    except BaseException:
        return 1
    if results.failed or not results.attempted or name not in names:
        return 1
    print(task["passed"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
