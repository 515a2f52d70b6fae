"""Free ports for the processes of a local cluster."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch.local.cluster import keep_port, with_ports


@pytest.fixture
def bound() -> Iterator[ExitStack]:
    """Keeps ports for the length of a test."""
    with ExitStack() as stack:
        yield stack


def preset(**gateway: Any) -> ClusterConfig:
    cluster = load_cluster("smollm2")
    return cluster.model_copy(update={"gateway": cluster.gateway.model_copy(update=gateway)})


def ports(cluster: ClusterConfig) -> list[int]:
    configs = [*cluster.shards, cluster.gateway]
    return [port for one in configs for port in (int(one.address.rpartition(":")[2]), one.metrics_port)]


def test_with_ports_replaces_every_zero_by_distinct_port(bound: ExitStack) -> None:
    found = ports(with_ports(preset(), bound))
    assert 0 not in found
    assert len(set(found)) == 6


def test_with_ports_keeps_hosts_and_other_fields(bound: ExitStack) -> None:
    changed = with_ports(preset(address="localhost:0", fallback_route="weak"), bound)
    assert changed.gateway.address.startswith("localhost:")
    assert changed.gateway.fallback_route == "weak"
    assert changed.routes == preset().routes


def test_with_ports_keeps_given_port(bound: ExitStack) -> None:
    address = f"127.0.0.1:{keep_port(bound)}"
    assert with_ports(preset(address=address), bound).gateway.address == address


def test_kept_port_is_only_for_programs_that_name_it(bound: ExitStack) -> None:
    port = keep_port(bound)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    # Servers set SO_REUSEADDR.
    with socket.create_server(("127.0.0.1", port)):
        pass
    bound.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_with_ports_refuses_port_in_use(bound: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(InvalidRequest, match=rf"gateway.address is '{address}', but .*in use"):
            with_ports(preset(address=address), bound)


def test_with_ports_refuses_address_of_other_machine(bound: ExitStack) -> None:
    # 192.0.2.0/24 is for documentation; no machine has it (RFC 5737).
    with pytest.raises(InvalidRequest, match=r"gateway.address is '192.0.2.1:0', but this machine can't listen there"):
        with_ports(preset(address="192.0.2.1:0"), bound)


@pytest.mark.parametrize("address", ["localhost", ":7001", "localhost:", "localhost:x", "localhost:65536"])
def test_with_ports_refuses_malformed_address(bound: ExitStack, address: str) -> None:
    with pytest.raises(InvalidRequest, match="it must be host:port"):
        with_ports(preset(address=address), bound)
