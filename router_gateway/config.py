"""The gateway's configuration, one section for each part. Reads no environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from router_gateway.routing.router import check_thresholds
from stitch.cluster import ClusterConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch.settings import Settings
from stitch.tls import check_exposure


class FleetSettings(Settings):
    """How shards are watched."""

    poll_seconds: float = Field(default=1.0, gt=0)
    # A shard that takes the connection and says nothing counts as silent after this ...
    answer_seconds: float = Field(default=3.0, gt=0)
    # ... and as gone after so many silent polls in a row.
    silent_polls: int = Field(default=2, ge=1)


class ReplaySettings(Settings):
    """How long a broken answer is resumed; every new token makes the counts begin anew."""

    wait_seconds: float = Field(default=5.0, ge=0)
    first_pause_seconds: float = Field(default=0.1, gt=0)
    most_losses: int = Field(default=5, ge=0)


class GatewaySettings(Settings):
    """All of it. Where something is None, the cluster file decides."""

    cluster: ClusterConfig
    listen: str | None = None
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    # Allows an address that other machines reach.
    insecure: bool = False
    # Running answers may take so long after SIGTERM.
    drain_seconds: float = Field(default=30.0, ge=0)
    # Requests of one batch call that run at once.
    batch_at_once: int = Field(default=32, ge=1)
    fleet: FleetSettings = FleetSettings()
    replay: ReplaySettings = ReplaySettings()

    @property
    def address(self) -> str:
        return self.listen or self.cluster.gateway.address

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]


def from_flags(flags: Mapping[str, Any]) -> GatewaySettings:
    """The settings for the flags of a command line; a flag that is None was not given.

    Raises InvalidRequest where the cluster or a value is not one.
    """
    names = ("listen", "metrics_port", "insecure", "drain_seconds")
    given = {name: flags[name] for name in names if flags[name] is not None}
    if flags["replay_wait_seconds"] is not None:
        given["replay"] = {"wait_seconds": flags["replay_wait_seconds"]}
    cluster = load_cluster(flags["cluster"])
    try:
        return GatewaySettings(cluster=cluster, **given)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(".".join(map(str, first["loc"])), first["input"], first["msg"]) from error


def check(settings: GatewaySettings) -> None:
    """Raises InvalidRequest, with a sentence, for what a gateway must not or can't start with."""
    host, _, port = settings.address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidRequest("listen", settings.address, "it must be host:port")
    check_exposure("listen", settings.address, settings.cluster.tls is not None, settings.insecure)
    for shard in settings.cluster.shards:
        if shard.address.endswith(":0"):
            limit = "it needs a port; only `stitch up` chooses free ones"
            raise InvalidRequest(f"shards.{shard.name}.address", shard.address, limit)
    check_thresholds(settings.cluster.gateway.thresholds, len(settings.cluster.routes))
