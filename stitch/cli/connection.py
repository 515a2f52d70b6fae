"""Finds the gateway that a command talks to. Doesn't know what it is asked there."""

from __future__ import annotations

import argparse
from pathlib import Path

from stitch.cluster import ClusterConfig
from stitch.local.run_folder import the_running_cluster


def gateway(parsed: argparse.Namespace) -> tuple[str, Path | None]:
    """What a client takes: `--gateway` and `--authority`, else those of the cluster that runs on this machine.

    Raises Unavailable where there is none.
    """
    if parsed.gateway:
        return parsed.gateway, parsed.authority
    address, authority = gateway_of(the_running_cluster().cluster())
    return address, parsed.authority or authority


def gateway_of(cluster: ClusterConfig) -> tuple[str, Path | None]:
    """The same of a cluster on this machine."""
    return cluster.gateway.address, cluster.folder / cluster.tls.authority if cluster.tls else None
