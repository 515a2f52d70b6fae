"""Runs a function's doctests on code that a model has written, in a process that can do little else.

The process is an isolated interpreter (`-I -S`) with an empty environment in an empty temporary folder. It has limits
on CPU time, memory, open files and the size of what it writes, and the kernel refuses it every system call but those of
computing and of reading files (seccomp): no network, no other process, no file created, changed or removed. It is
killed at a deadline. What it is not: a boundary against somebody who looks for bugs of the kernel, and code that knows
how it is tested can claim to pass.
"""

from __future__ import annotations

import json
import platform
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from stitch.errors import InvalidRequest

CHILD = Path(__file__).with_name("sandbox_child.py")
DEADLINE_SECONDS = 10.0
LIMITS = {
    "RLIMIT_CPU": 5,
    "RLIMIT_AS": 512 * 1024 * 1024,
    "RLIMIT_FSIZE": 64 * 1024,
    "RLIMIT_NOFILE": 16,
    "RLIMIT_NPROC": 0,
    "RLIMIT_CORE": 0,
}


@dataclass(frozen=True)
class DoctestedFunction:
    """A function with examples in its docstring."""

    # Of the standard library; None: it has no code but its header, and no imports but those in it.
    module: str | None
    name: str
    # Its definition up to the end of the docstring, and the imports before it.
    header: str
    doc: str


def check_platform() -> None:
    """Raises InvalidRequest where the sandbox can't be built."""
    found = f"{platform.system()} {platform.machine()}"
    if found != "Linux x86_64":
        raise InvalidRequest("functions", found, "answers that are code run in a sandbox of Linux on x86-64 alone")


def passes(function: DoctestedFunction, code: str | None) -> bool:
    """Whether every example of the function passes with `code` in its place; None: with the library's own code."""
    passed = secrets.token_hex(16)
    given = json.dumps({**asdict(function), "code": code, "limits": LIMITS, "passed": passed})
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        try:
            # Its output goes to a file, since the limit on sizes holds for files alone.
            subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD)],
                input=given.encode(),
                stdout=out,
                stderr=subprocess.DEVNULL,
                env={},
                cwd=folder,
                start_new_session=True,
                timeout=DEADLINE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        out.seek(0)
        return out.read().endswith(f"{passed}\n".encode())
