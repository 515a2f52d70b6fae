"""Code of models is tested by doctests, and can neither touch files, nor processes, nor a network."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stitch.errors import InvalidRequest
from stitch_training import sandbox
from stitch_training.functions import code_of, find_functions, is_correct, prompt_of
from stitch_training.sandbox import DoctestedFunction, check_platform, passes

pytestmark = pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="needs its sandbox")

BASENAME = DoctestedFunction(
    "shutil",
    "_basename",
    'def _basename(path):\n    """Returns the last part."""',
    ">>> _basename('a/b')\n'b'\n>>> _basename('a/b/')\n'b'\n",
)
RIGHT = "def _basename(path):\n    return path.rstrip('/').split('/')[-1]\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (None, True),
        (RIGHT, True),
        ("import os\n\ndef _basename(path):\n    return os.path.basename(path)\n", False),
        ("def _basename(path): return", False),
        ("def another(path): return 'b'", False),
        ("not Python", False),
        ("raise SystemExit(0)", False),
        # It has no way to the library's own function.
        ("from shutil import _basename", False),
        ("import shutil\n_basename = shutil._basename", False),
        # The end of the process alone is no success.
        ("import os\nos._exit(0)", False),
    ],
)
def test_code_passes_if_all_examples_do(code: str | None, expected: bool) -> None:
    assert passes(BASENAME, code) == expected


def test_function_without_a_module_has_the_imports_of_its_header() -> None:
    header = 'from math import floor\n\ndef half(number):\n    """Returns the half."""'
    function = DoctestedFunction(None, "half", header, ">>> half(3)\n1\n")
    assert passes(function, "def half(number): return floor(number / 2)")
    assert not passes(function, "def half(number): return ceil(number / 2)")
    assert not passes(function, None)


def attempt(statement: str) -> bool:
    """Whether correct code passes which first executes a statement that must raise OSError."""
    lines = ["import ctypes, os, signal, socket, subprocess", "try:", f"    {statement}"]
    return passes(BASENAME, "\n".join([*lines, "except OSError:", "    refused = True", "assert refused", RIGHT]))


@pytest.mark.parametrize(
    "statement",
    [
        "open('made', 'w')",
        "open({victim!r}, 'a')",
        "os.truncate({victim!r}, 0)",
        "os.remove({victim!r})",
        "os.rename({victim!r}, {victim!r} + 'x')",
        "os.chmod({victim!r}, 0)",
        "os.symlink({victim!r}, 'link')",
        "os.mkdir('folder')",
        "os.fork()",
        "subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "os.kill({process}, signal.SIGTERM)",
        "socket.create_connection(('127.0.0.1', {port}), 1)",
        "socket.socket(socket.AF_UNIX)",
    ],
)
def test_system_calls_beyond_computing_and_reading_are_refused(tmp_path: Path, statement: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as process:
        try:
            given = {"victim": str(victim), "process": process.pid, "port": server.getsockname()[1]}
            assert attempt(statement.format(**given))
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "kept"


def test_environment_and_folder_are_empty() -> None:
    assert passes(BASENAME, f"import os\nassert not set(os.environ) - {{'LC_CTYPE'}}\nassert not os.listdir()\n{RIGHT}")


def test_memory_and_output_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not passes(BASENAME, f"bytearray(10**9)\n{RIGHT}")
    large = "import os, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwhile os.write(1, bytes(10_000)): pass\n"
    assert not passes(BASENAME, large + RIGHT)


def test_endless_code_is_ended_by_its_cpu_time_and_sleeping_code_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sandbox.LIMITS, "RLIMIT_CPU", 1)
    assert not passes(BASENAME, "while True: pass")
    monkeypatch.setattr(sandbox, "DEADLINE_SECONDS", 1.0)
    assert not passes(BASENAME, "import time\ntime.sleep(3600)")


def test_other_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(
        InvalidRequest, match="functions is 'Linux riscv64', but answers that are code run in a sandbox"
    ):
        check_platform()


def test_functions_are_of_all_modules_in_turn_and_their_prompts_hold_no_code() -> None:
    found = find_functions(4)
    assert len({one.module for one in found}) == 4
    for function in found:
        prompt = prompt_of(function)
        assert f"def {function.name}(" in prompt
        assert prompt.rstrip("`\n").endswith(('"""', "'''"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"Here:\n```python\n{RIGHT}```\nIt splits.", True),
        (RIGHT, True),
        (f"```\nother()\n```\n```py\n{RIGHT}", True),
        ("I can't.", False),
        ("```python\nreturn path\n```", False),
    ],
)
def test_code_is_the_block_that_defines_the_function(answer: str, expected: bool) -> None:
    code = code_of(answer, BASENAME)
    assert (code is not None and code.strip() == RIGHT.strip()) == expected
    assert is_correct(answer, BASENAME) == expected
