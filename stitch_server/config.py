"""What one shard process is told: the cluster, its own part, where to listen. Reads no file and no flag."""

from __future__ import annotations

from pydantic import Field, ValidationError

from stitch.cluster import ClusterConfig, ShardConfig
from stitch.errors import InvalidRequest
from stitch.settings import Settings
from stitch.tls import check_exposure


class ShardSettings(Settings):
    cluster: ClusterConfig
    place: ShardConfig
    # host:port; by default the port of the place's address, on the same host.
    listen: str
    metrics_port: int = Field(ge=0, le=65535)
    insecure: bool = False
    drain_seconds: float = Field(default=30.0, ge=0)

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0]


def shard_settings(
    cluster: ClusterConfig,
    shard: str,
    listen: str | None,
    metrics_port: int | None,
    insecure: bool,
    drain_seconds: float,
) -> ShardSettings:
    """Fills in what no flag says.

    Raises InvalidRequest for an unknown shard, a value outside of its limits or an address that is not allowed.
    """
    place = cluster.shard(shard)
    try:
        settings = ShardSettings(
            cluster=cluster,
            place=place,
            listen=listen or place.address,
            metrics_port=place.metrics_port if metrics_port is None else metrics_port,
            insecure=insecure,
            drain_seconds=drain_seconds,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(str(first["loc"][0]), first["input"], first["msg"]) from error
    check_exposure("listen", settings.listen, cluster.tls is not None, insecure)
    return settings
