"""Whether a program of a cluster serves: `python -m stitch.health CLUSTER NAME` is a container's health check."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stitch.channels import serves
from stitch.cluster import ClusterConfig, load_cluster
from stitch.identity import Identity
from stitch.tls import GATEWAY, Tls, load_tls


def program_serves(cluster: ClusterConfig, name: str, tls: Tls | None) -> bool:
    """Whether the shard `name`, or the gateway, reports SERVING to a program with these certificates."""
    if name == GATEWAY:
        return serves(cluster.gateway.address, tls.gateway_client() if tls else None)
    host = Identity(cluster.name, "shard", name).host
    return serves(cluster.shard(name).address, tls.client() if tls else None, host)


def route_service(route: str) -> str:
    """The name of a route for health checks of the gateway, beside the names of its services."""
    return f"route/{route}"


def route_serves(cluster: ClusterConfig, route: str, tls: Tls | None) -> bool:
    """Whether the gateway reports SERVING for that route to a program with these certificates."""
    return serves(cluster.gateway.address, tls.gateway_client() if tls else None, service=route_service(route))


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 where the program serves, which is asked with its own certificate."""
    file, name = arguments
    cluster = load_cluster(file)
    return 0 if program_serves(cluster, name, load_tls(cluster.tls, cluster.folder, name)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
