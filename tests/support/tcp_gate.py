"""A TCP relay on the loopback interface, at which a test delays, throttles, stalls, garbles or cuts the traffic.

It stands between two processes: one is told the gate's address instead of the other's. It runs in a thread, so tests
with and without an event loop use it, and each change applies at once, to open connections too. The gate accepts a
connection before it reaches the other process, so a delay holds for bytes (the handshake of TLS, requests), not for
TCP's own handshake.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

CHUNK_BYTES = 4 * 1024
# The chunks of one direction of a connection that the gate holds before the sender has to wait.
MAX_CHUNKS = 64
START_SECONDS = 10.0
SETTLED_SECONDS = 0.01
# With this option a closed socket sends RST instead of FIN.
RESET = struct.pack("ii", 1, 0)


class Flow:
    """One direction of all connections through a gate."""

    def __init__(self) -> None:
        # Between the arrival of bytes at the gate and their departure.
        self.delay_seconds = 0.0
        # The rate of all connections together; None: no limit.
        self.bytes_per_second: float | None = None
        # The number of bytes, from now on, whose bits are inverted.
        self.bytes_to_garble = 0
        self.forwarded_bytes = 0
        self.open = asyncio.Event()
        self.open.set()
        # When the rate allows the next byte, in seconds of the event loop.
        self._free_at = 0.0

    def departure(self, size: int, now: float) -> float:
        """When bytes that arrived `now` leave the gate."""
        self._free_at = max(self._free_at, now)
        if self.bytes_per_second is not None:
            self._free_at += size / self.bytes_per_second
        return self._free_at + self.delay_seconds

    def passed(self, chunk: bytes) -> bytes:
        """The bytes that leave the gate in place of these."""
        garbled = min(self.bytes_to_garble, len(chunk))
        self.bytes_to_garble -= garbled
        self.forwarded_bytes += len(chunk)
        return bytes(byte ^ 0xFF for byte in chunk[:garbled]) + chunk[garbled:]

    def heal(self) -> None:
        self.delay_seconds, self.bytes_per_second, self.bytes_to_garble = 0.0, None, 0
        self._free_at = 0.0
        self.open.set()


class TcpGate:
    """A relay to `host:port` for the length of a `with` block; `address` is where it listens."""

    def __init__(self, to: str) -> None:
        self.address = ""
        # Connections accepted since the gate opened.
        self.accepted = 0
        self.to_server, self.to_client = Flow(), Flow()
        host, _, port = to.rpartition(":")
        self._to = host, int(port)
        self._connections: set[tuple[asyncio.Task[None], asyncio.StreamWriter]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name=f"gate to {to}", daemon=True)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._connections)

    def delay(self, seconds: float) -> None:
        """Bytes of both directions take this long, one way."""
        self._change(lambda: self._set_both(delay_seconds=seconds))

    def throttle(self, bytes_per_second: float) -> None:
        """Each direction passes at most this many bytes per second."""
        self._change(lambda: self._set_both(bytes_per_second=bytes_per_second))

    def stall(self) -> None:
        """Nothing passes, and nobody is told: connections stay open, and new ones are accepted."""
        self._change(self.to_server.open.clear, self.to_client.open.clear)

    def half_open(self) -> None:
        """What the server sends still passes; nothing reaches the server."""
        self._change(self.to_server.open.clear)

    def garble(self, count: int = 64) -> None:
        """Inverts the next bytes of each direction."""
        self._change(lambda: self._set_both(bytes_to_garble=count))

    def cut(self) -> None:
        """Resets every open connection on both ends; new ones are accepted."""
        self._change(self._reset_all)

    def heal(self) -> None:
        """Ends every fault; bytes that were stalled pass on."""
        self._change(self.to_server.heal, self.to_client.heal)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._listening.wait(START_SECONDS):
            raise TimeoutError(f"{self._thread.name} did not open within {START_SECONDS:g} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        assert self._closing is not None
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _change(self, *changes: Callable[[], object]) -> None:
        """Runs `changes` in the gate's thread and returns when they are done."""
        assert self._loop is not None
        done = threading.Event()
        for change in (*changes, done.set):
            self._loop.call_soon_threadsafe(change)
        done.wait(START_SECONDS)

    def _set_both(self, **fields: float) -> None:
        for flow in (self.to_server, self.to_client):
            for name, value in fields.items():
                setattr(flow, name, value)

    async def _run(self) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._listening.set()
        await self._closing.wait()
        server.close()
        # Connections that were accepted at this moment appear a few turns of the event loop later.
        await asyncio.sleep(SETTLED_SECONDS)
        tasks = [task for task, _ in self._connections]
        self._reset_all()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._connections.add((task, writer))
        try:
            await self._connect(reader, writer)
        except* (OSError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._connections.discard((task, writer))
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connects to the server and forwards until one side ends. Raises OSError where one side resets."""
        await self.to_server.open.wait()
        server_reader, server_writer = await asyncio.open_connection(*self._to)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_forward(self.to_server, reader, server_writer))
                both.create_task(_forward(self.to_client, server_reader, writer))
        except BaseException:
            _reset(server_writer)
            raise
        finally:
            server_writer.close()

    def _reset_all(self) -> None:
        for task, writer in list(self._connections):
            _reset(writer)
            task.cancel()


async def _forward(flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forwards one direction of a connection until its sender ends it."""
    clock = asyncio.get_running_loop().time
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS)
    async with asyncio.TaskGroup() as both:
        both.create_task(_depart(flow, held, writer))
        while chunk := await _read(flow, reader):
            await held.put((flow.departure(len(chunk), clock()), chunk))
        await held.put((clock(), b""))


async def _read(flow: Flow, reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(CHUNK_BYTES)
    except ConnectionError:
        # A reset passes a stalled gate as little as bytes do.
        await flow.open.wait()
        raise


async def _depart(flow: Flow, held: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due, chunk = await held.get()
        await asyncio.sleep(max(0.0, due - clock()))
        await flow.open.wait()
        if not chunk:
            writer.write_eof()
            return
        writer.write(flow.passed(chunk))
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
