"""A bare round trip to another process over TCP: one request and one reply, as the lower bound of an RPC."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Echo:
    """A connection to a process that answers every `request_bytes` with `reply_bytes`."""

    connection: socket.socket
    request_bytes: int
    reply_bytes: int

    def seconds(self) -> float:
        """The seconds of one round trip."""
        started = time.perf_counter()
        self.connection.sendall(bytes(self.request_bytes))
        _receive(self.connection, self.reply_bytes)
        return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class EchoServer:
    """A process that answers one connection."""

    address: str
    request_bytes: int
    reply_bytes: int

    @contextmanager
    def connected(self, address: str = "") -> Iterator[Echo]:
        """Connects to the process, by its own address or by that of a proxy."""
        host, _, port = (address or self.address).rpartition(":")
        with closing(socket.create_connection((host, int(port)))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield Echo(connection, self.request_bytes, self.reply_bytes)


@contextmanager
def tcp_echo(request_bytes: int, reply_bytes: int) -> Iterator[EchoServer]:
    """Runs the process for the block, which must connect to it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        inherited, port = server.fileno(), server.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.tcp_echo", *map(str, (inherited, request_bytes, reply_bytes))]
        with subprocess.Popen(command, pass_fds=[inherited]):
            yield EchoServer(f"127.0.0.1:{port}", request_bytes, reply_bytes)


def _receive(connection: socket.socket, count: int) -> bool:
    """Reads `count` bytes; returns False where the other side has closed."""
    while count:
        if not (received := connection.recv(count)):
            return False
        count -= len(received)
    return True


def main(inherited: int, request_bytes: int, reply_bytes: int) -> None:
    """Answers on an inherited listening socket until the other side closes."""
    with closing(socket.socket(fileno=inherited)) as server:
        connection, _ = server.accept()
        with closing(connection):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while _receive(connection, request_bytes):
                connection.sendall(bytes(reply_bytes))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
