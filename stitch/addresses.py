"""Who can reach an address. Opens none."""

from __future__ import annotations

import ipaddress

from stitch.errors import InvalidRequest


def check_exposure(field: str, address: str, secured: bool, insecure: bool) -> None:
    """InvalidRequest where other machines reach `host:port` without TLS and nobody has allowed it."""
    if not secured and not insecure and not is_loopback(address.rpartition(":")[0]):
        limit = "other machines reach it without TLS: the cluster file needs [tls], or --insecure allows it"
        raise InvalidRequest(field, address, limit)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; a name other than localhost may be anybody's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
