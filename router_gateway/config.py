"""The gateway's configuration: a cluster and one section for each component, which takes the section as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from router_gateway.requests.failover import RetryPolicy
from router_gateway.routing.router import check_thresholds
from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.replica import HealthPolicy
from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch.membership import check_addresses
from stitch.settings import Settings
from stitch.tls import check_exposure, is_loopback


class GatewaySettings(Settings):
    """Everything that a gateway is started with. For fields that are None, the cluster file's values apply."""

    cluster: ClusterConfig
    listen: str | None = None
    http: str | None = None
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    # Allows to listen on an address that other machines reach, without TLS.
    insecure: bool = False
    # Answers reflection on an address that other machines reach, too.
    reflection: bool = False
    # After SIGTERM, running answers are ended after this.
    drain_seconds: float = Field(default=30.0, ge=0)
    # Requests of one batch call that run at a time.
    batch_concurrency: int = Field(default=32, ge=1)
    health: HealthPolicy = HealthPolicy()
    ejection: EjectionPolicy = EjectionPolicy()
    retry: RetryPolicy = RetryPolicy()

    @property
    def address(self) -> str:
        return self.listen or self.cluster.gateway.address

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def http_address(self) -> str | None:
        """Where HTTP is served; None: nowhere."""
        return self.http or self.cluster.gateway.http

    @property
    def metrics_address(self) -> str:
        config = self.cluster.gateway
        port = config.metrics_port if self.metrics_port is None else self.metrics_port
        return f"{config.metrics_host}:{port}"

    @property
    def reflects(self) -> bool:
        """Whether it answers reflection, which tells every caller which methods there are."""
        return self.reflection or is_loopback(self.host)


def from_flags(flags: Mapping[str, Any]) -> GatewaySettings:
    """The settings for the flags of a command line; a flag that is None was not given.

    Raises InvalidRequest for an invalid cluster file or value.
    """
    names = ("listen", "http", "metrics_port", "insecure", "reflection", "drain_seconds")
    given = {name: flags[name] for name in names if flags[name] is not None}
    if flags["replay_wait_seconds"] is not None:
        given["retry"] = {"wait_seconds": flags["replay_wait_seconds"]}
    cluster = load_cluster(flags["cluster"])
    try:
        return GatewaySettings(cluster=cluster, **given)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(".".join(map(str, first["loc"])), first["input"], first["msg"]) from error


def check(settings: GatewaySettings) -> None:
    """Raises InvalidRequest for settings that a gateway can't, or must not, start with."""
    served = {"listen": settings.address}
    if settings.http_address is not None:
        served["http"] = settings.http_address
    for field, address in served.items():
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidRequest(field, address, "it must be host:port")
    for field, address in {**served, "metrics_host": settings.metrics_address}.items():
        check_exposure(field, address, settings.cluster.tls is not None, settings.insecure)
    for field, address in served.items():
        _check_clients(settings, field, address)
    check_addresses(settings.cluster)
    check_thresholds(settings.cluster.gateway.thresholds, len(settings.cluster.routes))


def _check_clients(settings: GatewaySettings, field: str, address: str) -> None:
    """Raises InvalidRequest where everybody on other machines may ask, and `insecure` doesn't allow it."""
    tls = settings.cluster.tls
    by_certificate = tls is not None and tls.client_authority is not None
    known = by_certificate or settings.cluster.gateway.keys is not None
    if not known and not settings.insecure and not is_loopback(address.rpartition(":")[0]):
        limit = "everybody may ask there: set [gateway] keys or [tls] client_authority, or --insecure allows it"
        raise InvalidRequest(field, address, limit)
