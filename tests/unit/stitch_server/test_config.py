"""The settings of a shard come from flags and the cluster file, and an exposed address needs TLS or `--insecure`."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from stitch.tls import TlsFiles
from stitch_server.config import ShardSettings, shard_settings

FLAGS: dict[str, Any] = {
    "listen": None,
    "metrics_port": None,
    "insecure": False,
    "reflection": False,
    "drain_seconds": 30.0,
}


def settings(shard: str = "top-0", **flags: Any) -> ShardSettings:
    return shard_settings(load_cluster("smollm2"), shard, **{**FLAGS, **flags})


def test_defaults_come_from_the_cluster_file() -> None:
    made = settings()
    assert (made.shard.name, made.shard.layers) == ("top-0", (20, 30))
    assert (made.listen, made.host, made.metrics_port, made.insecure) == ("127.0.0.1:0", "127.0.0.1", 0, False)


def test_flags_override_the_cluster_file() -> None:
    made = settings(listen="localhost:7", metrics_port=9, drain_seconds=1.5)
    assert (made.listen, made.host, made.metrics_port, made.drain_seconds) == ("localhost:7", "localhost", 9, 1.5)


def by_dns(listen: str | None) -> ShardSettings:
    cluster = load_cluster("smollm2")
    entry = cluster.shard("top-0").model_copy(update={"name": "top", "address": "dns:top.test:7001"})
    return shard_settings(
        cluster.model_copy(update={"shards": (*cluster.shards, entry)}), "top", **{**FLAGS, "listen": listen}
    )


def test_replica_of_a_name_is_the_one_at_the_address_on_which_it_listens() -> None:
    shard = by_dns("127.0.0.2:7001").shard
    assert (shard.name, shard.certified_name, shard.layers) == ("top-127-0-0-2", "top", (20, 30))
    assert by_dns("[::1]:7001").shard.name == "top---1"


@pytest.mark.parametrize("listen", [None, "0.0.0.0:7001", "[::]:7001", "localhost:7001"])
def test_replica_of_a_name_needs_an_address_to_listen_on(listen: str | None) -> None:
    with pytest.raises(InvalidRequest, match=r"listen is .*an IP address that DNS has for top\.test"):
        by_dns(listen)


@pytest.mark.parametrize("listen", ["127.0.0.1:7", "localhost:7", "[::1]:7"])
def test_loopback_address_is_allowed(listen: str) -> None:
    assert settings(listen=listen).listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:7", "10.0.0.1:7", ":7", "[::]:7", "localhost.example:7", "7"])
def test_exposed_address_needs_the_insecure_flag(listen: str) -> None:
    with pytest.raises(InvalidRequest, match="--insecure allows it") as caught:
        settings(listen=listen)
    assert (caught.value.field, caught.value.value) == ("listen", listen)
    assert settings(listen=listen, insecure=True).listen == listen


def test_metrics_beyond_loopback_need_tls_or_the_insecure_flag() -> None:
    cluster = load_cluster("smollm2")
    open_top = cluster.shard("top-0").model_copy(update={"metrics_host": "0.0.0.0"})
    exposed = cluster.model_copy(update={"shards": (cluster.shards[0], open_top)})
    with pytest.raises(InvalidRequest, match=r"metrics_host is '0\.0\.0\.0:0', but .*--insecure allows it"):
        shard_settings(exposed, "top-0", **FLAGS)
    secured = exposed.model_copy(update={"tls": TlsFiles(authority="a", certificate="c", key="k")})
    for given, flags in (exposed, {"insecure": True}), (secured, {}):
        assert shard_settings(given, "top-0", **{**FLAGS, **flags}).metrics_address == "0.0.0.0:0"
    assert settings().metrics_address == "127.0.0.1:0"


def test_reflection_is_answered_on_loopback_or_by_its_flag() -> None:
    assert settings().reflects
    assert not settings(listen="0.0.0.0:7", insecure=True).reflects
    assert settings(listen="0.0.0.0:7", insecure=True, reflection=True).reflects


def test_unknown_shard_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidRequest, match="shard is 'top-9', but the cluster file has: bottom-0, top-0"):
        settings("top-9")


@pytest.mark.parametrize(("field", "value"), [("drain_seconds", -1.0), ("metrics_port", -1), ("metrics_port", 65536)])
def test_value_outside_its_limits_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settings(**{field: value})
    assert (caught.value.field, caught.value.value) == (field, value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        settings().listen = "0.0.0.0:7"
