"""The settings of one shard process: the cluster, which shard it is, and where it listens.

`shard_settings` merges the values of the command line with the defaults of the cluster file. A `ShardSettings` is
frozen and within its limits, and its address is one that the cluster's TLS settings allow.
"""

from __future__ import annotations

from ipaddress import ip_address

from pydantic import Field, ValidationError

from stitch.cluster import ClusterConfig, ShardConfig
from stitch.errors import InvalidRequest
from stitch.settings import Settings
from stitch.tls import check_exposure, is_loopback


class ShardSettings(Settings):
    """What `stitch_server.server.serve` takes."""

    cluster: ClusterConfig
    shard: ShardConfig
    # host:port; by default the address of `shard`.
    listen: str
    metrics_port: int = Field(ge=0, le=65535)
    insecure: bool = False
    # Answers reflection on an address that other machines reach, too.
    reflection: bool = False
    drain_seconds: float = Field(default=30.0, ge=0)

    @property
    def host(self) -> str:
        """The host part of `listen`."""
        return self.listen.rpartition(":")[0]

    @property
    def metrics_address(self) -> str:
        return f"{self.shard.metrics_host}:{self.metrics_port}"

    @property
    def reflects(self) -> bool:
        """Whether it answers reflection, which tells every caller which methods there are."""
        return self.reflection or is_loopback(self.host)


def shard_settings(
    cluster: ClusterConfig,
    shard: str,
    listen: str | None,
    metrics_port: int | None,
    insecure: bool,
    reflection: bool,
    drain_seconds: float,
) -> ShardSettings:
    """The settings from the command line; what is None there comes from the cluster file.

    Raises InvalidRequest for an unknown shard, a value outside its limits, or an address that needs TLS.
    """
    config = _own(cluster.shard(shard), listen)
    try:
        settings = ShardSettings(
            cluster=cluster,
            shard=config,
            listen=listen or config.address,
            metrics_port=config.metrics_port if metrics_port is None else metrics_port,
            insecure=insecure,
            reflection=reflection,
            drain_seconds=drain_seconds,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(str(first["loc"][0]), first["input"], first["msg"]) from error
    for field, address in ("listen", settings.listen), ("metrics_host", settings.metrics_address):
        check_exposure(field, address, cluster.tls is not None, insecure)
    return settings


def _own(entry: ShardConfig, listen: str | None) -> ShardConfig:
    """This process among the replicas of an entry with a name of DNS, else the entry."""
    if entry.dns_host is None:
        return entry
    host = (listen or "").rpartition(":")[0].strip("[]")
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if address is None or address.is_unspecified:
        limit = f"replicas of {entry.name} have an IP address that DNS has for {entry.dns_host}, and listen on it"
        raise InvalidRequest("listen", listen, limit)
    return entry.at(str(address))
