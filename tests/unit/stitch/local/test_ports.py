"""Every process gets a port of its own, or a reason why not. Knows no process."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch.local.ports import with_ports


def preset(**gateway: Any) -> ClusterConfig:
    cluster = load_cluster("smollm2")
    return cluster.model_copy(update={"gateway": cluster.gateway.model_copy(update=gateway)})


def ports(cluster: ClusterConfig) -> list[int]:
    places = [*cluster.shards, cluster.gateway]
    return [port for place in places for port in (int(place.address.rpartition(":")[2]), place.metrics_port)]


def test_every_zero_becomes_a_port_of_its_own() -> None:
    found = ports(with_ports(preset()))
    assert 0 not in found
    assert len(set(found)) == 6


def test_hosts_and_everything_else_stay() -> None:
    placed = with_ports(preset(address="localhost:0", fallback_route="weak"))
    assert placed.gateway.address.startswith("localhost:")
    assert placed.gateway.fallback_route == "weak"
    assert placed.routes == preset().routes


def test_a_port_that_is_given_stays() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert with_ports(preset(address=f"127.0.0.1:{port}")).gateway.address == f"127.0.0.1:{port}"


def test_the_ports_are_free_afterwards() -> None:
    address = with_ports(preset()).gateway.address
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidRequest, match=rf"gateway.address is '{address}', but .*in use"):
            with_ports(preset(address=address))


def test_an_address_of_another_machine_is_named() -> None:
    # 192.0.2.0/24 is for documentation; no machine has it (RFC 5737).
    with pytest.raises(InvalidRequest, match=r"gateway.address is '192.0.2.1:0', but this machine can't listen there"):
        with_ports(preset(address="192.0.2.1:0"))


@pytest.mark.parametrize("address", ["localhost", ":7001", "localhost:", "localhost:x", "localhost:65536"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(InvalidRequest, match="it must be host:port"):
        with_ports(preset(address=address))
