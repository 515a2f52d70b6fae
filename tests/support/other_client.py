"""Another client of a gateway, in a process of its own: measures health checks, descriptions, and the gateway's memory.

    python -m tests.support.other_client ADDRESS PID

It asks until its input ends, and then prints the slowest answer in seconds and the most resident bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from grpc_health.v1 import health_pb2, health_pb2_grpc

from stitch.channels import open_sync_channel
from stitch.client import Client

PAUSE_SECONDS = 0.02
TIMEOUT_SECONDS = 60.0


class OtherClient:
    """Runs the process within a block; the figures are there at its end."""

    def __init__(self, address: str, pid: int) -> None:
        command = [sys.executable, "-m", __name__, address, str(pid)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.slowest_seconds = 0.0
        # More than at the block's start.
        self.added_bytes = 0

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        # Until it has had its first answers.
        self._process.stdout.readline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        output, _ = self._process.communicate("end\n", timeout=TIMEOUT_SECONDS)
        self.slowest_seconds, self.added_bytes = json.loads(output)


def resident_bytes(pid: int) -> int:
    """The memory that a process has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))


def main(address: str, pid: int) -> None:
    """Measures until the input ends."""
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.readline()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    slowest, most = 0.0, 0
    with open_sync_channel(address) as channel, Client(address) as client:
        health = health_pb2_grpc.HealthStub(channel)

        def ask() -> float:
            start = time.perf_counter()
            health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
            client.describe(timeout=TIMEOUT_SECONDS)
            return time.perf_counter() - start

        ask()
        before = resident_bytes(pid)
        print("started", flush=True)
        while not ended.wait(PAUSE_SECONDS):
            slowest, most = max(slowest, ask()), max(most, resident_bytes(pid))
    print(json.dumps([slowest, most - before]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
