"""What a round trip to another process costs at least: a request and a reply over TCP, and nothing else."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TcpEcho:
    """A connection to a process of its own that answers every `request_bytes` with `reply_bytes`."""

    connection: socket.socket
    request_bytes: int
    reply_bytes: int

    def seconds(self) -> float:
        """One round trip."""
        started = time.perf_counter()
        self.connection.sendall(bytes(self.request_bytes))
        _receive(self.connection, self.reply_bytes)
        return time.perf_counter() - started


@contextmanager
def tcp_echo(request_bytes: int, reply_bytes: int) -> Iterator[TcpEcho]:
    """The other process lives as long as the block."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.tcp_echo", str(port), str(request_bytes), str(reply_bytes)]
        with subprocess.Popen(command) as process:
            connection, _ = server.accept()
            with closing(connection):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield TcpEcho(connection, request_bytes, reply_bytes)
            process.wait()


def _receive(connection: socket.socket, count: int) -> bool:
    """Reads so many bytes; False where the other side has closed."""
    while count:
        if not (part := connection.recv(count)):
            return False
        count -= len(part)
    return True


def main(port: int, request_bytes: int, reply_bytes: int) -> None:
    """The answering process, until the other side closes."""
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while _receive(connection, request_bytes):
            connection.sendall(bytes(reply_bytes))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
