"""Finds the gateway that a command talks to. Doesn't know what it is asked there."""

from __future__ import annotations

import argparse

from stitch.local.state import the_running_cluster


def gateway_address(parsed: argparse.Namespace) -> str:
    """`--gateway`, else the address of the cluster that runs on this machine; Unavailable where there is none."""
    if parsed.gateway:
        return str(parsed.gateway)
    return the_running_cluster().cluster().gateway.address
