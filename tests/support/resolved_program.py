"""Runs one of the two server programs with a resolver of the test's: a JSON file with the addresses of each host.

The file is named by $STITCH_TEST_ADDRESSES; the first argument is the program's module, the others are its own.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path

from stitch import membership

ADDRESSES = "STITCH_TEST_ADDRESSES"


def addresses() -> dict[str, list[str]]:
    """The content of the file."""
    found: dict[str, list[str]] = json.loads(Path(os.environ[ADDRESSES]).read_text())
    return found


async def resolve(host: str) -> Collection[str]:
    """The host's addresses in the file. Raises OSError where it has none."""
    found = addresses()
    if host not in found:
        raise OSError(f"no such host: {host}")
    return found[host]


def main() -> int:
    """The program's exit status."""
    # The default of what the program imports after it has prepared the process.
    vars(membership)["resolve_by_system"] = resolve
    status: int = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
    return status


if __name__ == "__main__":
    sys.exit(main())
