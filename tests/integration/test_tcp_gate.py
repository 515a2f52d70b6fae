"""The TCP gate does to connections what its methods say, and a cluster's traffic goes through the gates it is given."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from stitch.errors import Unavailable
from tests.support.processes import CLIENT, GATEWAY, running_cluster
from tests.support.tcp_gate import TcpGate
from tests.support.tiny_cluster import write_tiny_cluster
from tests.support.waiting import becomes_true

WAIT_SECONDS = 10.0
# Long enough for anything that passes an open gate, short enough to wait for nothing.
SILENCE_SECONDS = 0.2


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that returns what it receives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve_echo, args=(listener,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _serve_echo(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection, suppress(OSError):
        while data := connection.recv(65536):
            connection.sendall(data)


@pytest.fixture
def gate(echo: str) -> Iterator[TcpGate]:
    with TcpGate(echo) as opened:
        yield opened


@pytest.fixture
def connection(gate: TcpGate) -> Iterator[socket.socket]:
    host, _, port = gate.address.rpartition(":")
    with socket.create_connection((host, int(port)), WAIT_SECONDS) as connected:
        assert echoed(connected, b"open") == b"open"
        yield connected


def echoed(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    received = b""
    while len(received) < len(data):
        received += connection.recv(65536)
    return received


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(SILENCE_SECONDS)
    try:
        return connection.recv(1) is None
    except TimeoutError:
        return True
    finally:
        connection.settimeout(WAIT_SECONDS)


def test_open_gate_forwards_and_counts_bytes(gate: TcpGate, connection: socket.socket) -> None:
    data = bytes(range(256)) * 4_000
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    received = b""
    while len(received) < len(data):
        received += connection.recv(65536)
    sender.join()
    assert received == data
    assert gate.to_server.forwarded_bytes == gate.to_client.forwarded_bytes == len(data) + len(b"open")
    assert (gate.accepted, gate.connections) == (1, 1)


def test_delay_holds_in_both_directions(gate: TcpGate, connection: socket.socket) -> None:
    gate.delay(0.1)
    started = time.monotonic()
    assert echoed(connection, b"late") == b"late"
    assert time.monotonic() - started >= 0.2


def test_throttle_limits_the_rate(gate: TcpGate, connection: socket.socket) -> None:
    gate.throttle(100_000)
    started = time.monotonic()
    echoed(connection, b"x" * 20_000)
    assert time.monotonic() - started >= 0.2


def test_stalled_gate_forwards_nothing_until_it_heals(gate: TcpGate, connection: socket.socket) -> None:
    gate.stall()
    connection.sendall(b"held")
    host, _, port = gate.address.rpartition(":")
    with socket.create_connection((host, int(port)), WAIT_SECONDS) as another:
        another.sendall(b"new")
        assert is_silent(another)
        assert is_silent(connection)
        gate.heal()
        assert connection.recv(4) == b"held"
        assert another.recv(3) == b"new"


def test_half_open_gate_passes_what_the_server_sends(gate: TcpGate, connection: socket.socket) -> None:
    gate.delay(0.1)
    connection.sendall(b"sent")
    assert becomes_true(lambda: gate.to_server.forwarded_bytes == 8, WAIT_SECONDS)
    gate.half_open()
    assert connection.recv(4) == b"sent"
    connection.sendall(b"lost")
    assert is_silent(connection)


def test_garbling_gate_inverts_as_many_bytes(gate: TcpGate, connection: socket.socket) -> None:
    gate.garble(2)
    # Inverted on the way there and on the way back.
    assert echoed(connection, b"same") == b"same"
    gate.to_client.bytes_to_garble = 2
    assert echoed(connection, b"same") == bytes(byte ^ 0xFF for byte in b"sa") + b"me"
    assert echoed(connection, b"same") == b"same"


def test_cut_resets_open_connections_and_accepts_new_ones(gate: TcpGate, connection: socket.socket) -> None:
    gate.cut()
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    host, _, port = gate.address.rpartition(":")
    with socket.create_connection((host, int(port)), WAIT_SECONDS) as another:
        assert echoed(another, b"again") == b"again"
    assert becomes_true(lambda: gate.connections == 0, WAIT_SECONDS)


def test_connection_ends_with_its_client(gate: TcpGate, connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""
    assert becomes_true(lambda: gate.connections == 0, WAIT_SECONDS)


def test_gate_to_no_server_resets_its_client(echo: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    with TcpGate(address) as gate:
        host, _, port = gate.address.rpartition(":")
        with pytest.raises(ConnectionError), socket.create_connection((host, int(port)), WAIT_SECONDS) as connection:
            connection.recv(1)


@pytest.mark.slow
def test_processes_reach_each_other_through_their_gates(tmp_path: Path) -> None:
    gates = [(CLIENT, GATEWAY), (GATEWAY, "bottom-0"), ("bottom-0", "top-0"), (CLIENT, "gateway-1")]
    flags = {GATEWAY: ["--replay-wait-seconds", "0.2"]}
    with running_cluster(write_tiny_cluster(tmp_path), tmp_path / "run", gates, 2, flags) as cluster:
        for gateway in (GATEWAY, "gateway-1"):
            with cluster.client_of(cluster.gate(CLIENT, gateway).address) as client:
                assert client.generate("stitch", route="weak", max_tokens=4, ignore_eos=True).generated_tokens == 4
        for gate in cluster.gates.values():
            assert gate.to_client.forwarded_bytes > 0
        cluster.gate("bottom-0", "top-0").stall()
        cluster.gate("bottom-0", "top-0").cut()
        with pytest.raises(Unavailable):
            cluster.generate("stitch", route="weak", max_tokens=4)
