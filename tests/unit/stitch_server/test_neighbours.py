"""A chain names shards of the cluster, one for every stage that follows; nothing that a caller says is an address."""

from __future__ import annotations

import pytest

from stitch.cluster import ClusterConfig, GatewayConfig, ModelConfig, PairConfig, RouteConfig, ShardConfig
from stitch.errors import Incompatible, InvalidRequest, Unavailable
from stitch.membership import LATE_SECONDS, Membership
from stitch.v1 import shard_pb2
from stitch_server.neighbours import Neighbours


def shard(name: str, first: int, end: int) -> ShardConfig:
    role = "bottom" if name.startswith("bottom") else "top"
    return ShardConfig(name=name, role=role, layers=(first, end), address=f"{name}.example:7000")


# "weak" enters the top model on a shard that "strong" leaves out.
CLUSTER = ClusterConfig(
    name="pair",
    models=PairConfig(bottom=ModelConfig(id="large", source="large"), top=ModelConfig(id="small", source="small")),
    routes=(
        RouteConfig(name="weak", bottom_layers=3, top_from=2, stitch="weak.safetensors"),
        RouteConfig(name="strong", bottom_layers=4, top_from=3, stitch="strong.safetensors"),
    ),
    shards=(
        shard("bottom-0", 0, 4),
        shard("top-0", 2, 3),
        shard("top-1", 2, 3),
        shard("top-2", 3, 4),
    ),
    gateway=GatewayConfig(address="gateway.example:7000"),
)


def neighbours_of(own: str, cluster: ClusterConfig = CLUSTER) -> Neighbours:
    return Neighbours(Membership(cluster), CLUSTER.shard(own))


def test_route_begins_on_the_shards_of_its_first_stage_alone() -> None:
    neighbours_of("bottom-0").check_first("weak")
    with pytest.raises(InvalidRequest, match="it begins on bottom-0, not on top-1"):
        neighbours_of("top-1").check_first("weak")
    with pytest.raises(InvalidRequest, match="this cluster has: weak, strong"):
        neighbours_of("bottom-0").check_first("none")


def test_address_is_that_of_the_cluster_file() -> None:
    assert neighbours_of("bottom-0").address_of("top-1") == "top-1.example:7000"


@pytest.mark.parametrize("name", ["top-9", "", "127.0.0.1:7000", "unix:/tmp/socket", "top-1.example:7000"])
def test_name_that_the_cluster_lacks_has_no_address(name: str) -> None:
    with pytest.raises(Unavailable, match="is not in the cluster") as caught:
        neighbours_of("bottom-0").address_of(name)
    assert caught.value.shard == name


@pytest.mark.parametrize(
    ("own", "route", "chain"),
    [
        ("bottom-0", "weak", ("top-0", "top-2")),
        ("bottom-0", "weak", ("top-1", "top-2")),
        ("bottom-0", "strong", ("top-2",)),
        ("top-1", "weak", ("top-2",)),
        ("top-2", "weak", ()),
        ("top-2", "strong", ()),
    ],
)
def test_replicas_of_the_stages_that_follow_are_a_chain(own: str, route: str, chain: tuple[str, ...]) -> None:
    neighbours_of(own).check_chain(route, chain)


@pytest.mark.parametrize(
    ("own", "route", "chain", "message"),
    [
        ("bottom-0", "weak", (), "chain is [], but after bottom-0 route weak passes top-0 or top-1, then top-2"),
        ("bottom-0", "weak", ("top-0",), "passes top-0 or top-1, then top-2"),
        ("bottom-0", "weak", ("top-2", "top-0"), "passes top-0 or top-1, then top-2"),
        ("bottom-0", "weak", ("bottom-0", "top-2"), "passes top-0 or top-1, then top-2"),
        ("bottom-0", "weak", ("top-0", "top-2", "top-2"), "passes top-0 or top-1, then top-2"),
        ("bottom-0", "strong", ("top-0",), "chain is ['top-0'], but after bottom-0 route strong passes top-2"),
        ("top-2", "weak", ("top-0",), "chain is ['top-0'], but after top-2 route weak passes no shard"),
        ("bottom-0", "weak", ("top-0", "unix:/tmp/s"), "chain is 'unix:/tmp/s', but the cluster has: bottom-0, top-0"),
        ("bottom-0", "weak", ("x\ny",), r"chain is 'x\ny', but the cluster has: bottom-0, top-0, top-1, top-2"),
    ],
)
def test_other_chain_is_refused_by_value_and_limit(own: str, route: str, chain: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        neighbours_of(own).check_chain(route, chain)
    assert caught.value.field == "chain"
    assert message in str(caught.value)


def test_route_that_does_not_pass_the_shard_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="route is 'strong', but it does not pass top-0"):
        neighbours_of("top-0").check_chain("strong", ("top-2",))


def identity(name: str, role: str, first: int, end: int) -> shard_pb2.ShardIdentity:
    return shard_pb2.ShardIdentity(shard=name, role=role, first_layer=first, end_layer=end)


def test_upstream_shard_has_the_layers_of_the_cluster_file() -> None:
    neighbours_of("top-0").check_upstream(identity("bottom-0", "bottom", 0, 4))


@pytest.mark.parametrize(
    "stated", [("bottom-1", "bottom", 0, 4), ("bottom-0", "top", 0, 4), ("bottom-0", "bottom", 0, 3), ("", "", 0, 0)]
)
def test_other_upstream_shard_is_refused(stated: tuple[str, str, int, int]) -> None:
    with pytest.raises(Incompatible, match="is not in the cluster of top-0"):
        neighbours_of("top-0").check_upstream(identity(*stated))


@pytest.mark.parametrize("chain", [("top-9", "top-2"), ("top-0", "gone")])
def test_name_of_no_shard_yet_is_unavailable_and_not_invalid(chain: tuple[str, ...]) -> None:
    with pytest.raises(Unavailable, match="is not in the cluster of bottom-0") as caught:
        neighbours_of("bottom-0").check_chain("weak", chain)
    assert caught.value.shard in ("top-9", "gone")


class Found:
    """A resolver of one name, and how often it was asked."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked = 0

    async def __call__(self, host: str) -> list[str]:
        self.asked += 1
        return self.addresses


def with_dns() -> ClusterConfig:
    entry = CLUSTER.shard("top-1").model_copy(update={"name": "top", "address": "dns:top.test:7000"})
    return CLUSTER.model_copy(update={"shards": (*CLUSTER.shards, entry)})


async def test_unknown_name_is_looked_up_before_it_is_refused() -> None:
    found, cluster = Found(), with_dns()
    neighbours = Neighbours(Membership(cluster, found), cluster.shard("bottom-0"))
    found.addresses = ["10.0.0.7"]
    chain = ("top-10-0-0-7", "top-2")
    with pytest.raises(Unavailable):
        neighbours.check_chain("weak", chain)
    await neighbours.meet(chain)
    neighbours.check_chain("weak", chain)
    assert neighbours.address_of("top-10-0-0-7") == "10.0.0.7:7000"
    assert neighbours.certified_name("top-10-0-0-7") == "top"
    neighbours.check_upstream(identity("top-10-0-0-7", "top", 2, 3))
    assert neighbours.has_replica("top-10-0-0-7")
    await neighbours.meet(["top-0", "127.0.0.1:7", "unix:/tmp/socket", "", *chain])
    assert found.asked == 1


async def test_shard_that_was_just_removed_may_be_in_a_chain_for_some_seconds() -> None:
    found, cluster, now = Found(), with_dns(), [0.0]
    membership = Membership(cluster, found, clock=lambda: now[0])
    neighbours = Neighbours(membership, cluster.shard("bottom-0"))
    for found.addresses in ["10.0.0.7"], ["10.0.0.8"]:
        now[0] += 1.0
        await membership.refresh()
    chain = ("top-10-0-0-7", "top-2")
    neighbours.check_chain("weak", chain)
    assert neighbours.address_of("top-10-0-0-7") == "10.0.0.7:7000"
    with pytest.raises(Incompatible):
        neighbours.check_upstream(identity("top-10-0-0-7", "top", 2, 3))
    now[0] += LATE_SECONDS
    with pytest.raises(Unavailable):
        neighbours.check_chain("weak", chain)


async def test_shard_that_dns_does_not_have_yet_knows_what_follows_it() -> None:
    cluster = with_dns()
    neighbours = Neighbours(Membership(cluster, Found()), cluster.shard("top").at("10.0.0.7"))
    neighbours.check_chain("weak", ("top-2",))


def test_refusal_names_the_field_of_the_request() -> None:
    with pytest.raises(InvalidRequest) as caught:
        neighbours_of("bottom-0").check_chain("weak", (), "candidates.chain")
    assert caught.value.field == "candidates.chain"
