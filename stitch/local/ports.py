"""Gives every process of a cluster a port of its own on this machine. Doesn't know what listens there."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TypeVar

from stitch.cluster import ClusterConfig, GatewayConfig, ShardConfig
from stitch.errors import InvalidRequest

Place = TypeVar("Place", ShardConfig, GatewayConfig)


def with_ports(cluster: ClusterConfig) -> ClusterConfig:
    """The cluster with a free port in place of every 0.

    Raises InvalidRequest for an address that is not of this machine, or taken.
    """
    # All ports stay taken until the last one is found, or two processes might be given the same.
    with ExitStack() as held:
        shards = tuple(_placed(held, shard.name, shard) for shard in cluster.shards)
        gateway = _placed(held, "gateway", cluster.gateway)
    return cluster.model_copy(update={"shards": shards, "gateway": gateway})


def _placed(held: ExitStack, name: str, place: Place) -> Place:
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{name}.address", place.address, "it must be host:port")
    address = f"{host}:{_taken(held, f'{name}.address', host, int(port))}"
    metrics_port = _taken(held, f"{name}.metrics_port", host, place.metrics_port)
    return place.model_copy(update={"address": address, "metrics_port": metrics_port})


def _taken(held: ExitStack, field: str, host: str, port: int) -> int:
    """Takes the port, any free one for 0, until `held` closes."""
    bare = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        listener = held.enter_context(socket.create_server((bare, port), family=family))
    except OSError as error:
        raise InvalidRequest(field, f"{host}:{port}", f"this machine can't listen there: {error.strerror}") from error
    return int(listener.getsockname()[1])
