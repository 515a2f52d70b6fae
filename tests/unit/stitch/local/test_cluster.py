"""Free ports for the processes of a local cluster."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch.local.cluster import with_ports


def preset(**gateway: Any) -> ClusterConfig:
    cluster = load_cluster("smollm2")
    return cluster.model_copy(update={"gateway": cluster.gateway.model_copy(update=gateway)})


def ports(cluster: ClusterConfig) -> list[int]:
    configs = [*cluster.shards, cluster.gateway]
    return [port for one in configs for port in (int(one.address.rpartition(":")[2]), one.metrics_port)]


def test_with_ports_replaces_every_zero_by_distinct_port() -> None:
    found = ports(with_ports(preset()))
    assert 0 not in found
    assert len(set(found)) == 6


def test_with_ports_keeps_hosts_and_other_fields() -> None:
    changed = with_ports(preset(address="localhost:0", fallback_route="weak"))
    assert changed.gateway.address.startswith("localhost:")
    assert changed.gateway.fallback_route == "weak"
    assert changed.routes == preset().routes


def test_with_ports_keeps_given_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert with_ports(preset(address=f"127.0.0.1:{port}")).gateway.address == f"127.0.0.1:{port}"


def test_with_ports_releases_ports() -> None:
    address = with_ports(preset()).gateway.address
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_with_ports_refuses_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(InvalidRequest, match=rf"gateway.address is '{address}', but .*in use"):
            with_ports(preset(address=address))


def test_with_ports_refuses_address_of_other_machine() -> None:
    # 192.0.2.0/24 is for documentation; no machine has it (RFC 5737).
    with pytest.raises(InvalidRequest, match=r"gateway.address is '192.0.2.1:0', but this machine can't listen there"):
        with_ports(preset(address="192.0.2.1:0"))


@pytest.mark.parametrize("address", ["localhost", ":7001", "localhost:", "localhost:x", "localhost:65536"])
def test_with_ports_refuses_malformed_address(address: str) -> None:
    with pytest.raises(InvalidRequest, match="it must be host:port"):
        with_ports(preset(address=address))
