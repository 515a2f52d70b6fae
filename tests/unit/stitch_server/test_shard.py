"""The shards of a tiny cluster: what each describes, and the answers of their chains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prometheus_client import generate_latest

from stitch.cluster import ClusterConfig
from stitch.errors import Incompatible, StitchError
from stitch.membership import Membership
from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.build import load_stage
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.metrics import Metrics
from stitch_server.model.description import ParameterCount
from stitch_server.model.stitch import Stitch
from stitch_server.neighbours import Neighbours
from stitch_server.rpc.handshake import PROTOCOL_VERSION, check_hello, check_welcome
from stitch_server.rpc.tensors import pack
from stitch_server.shard import Shard, build_shard, resolved_batching
from tests.support.engine_fakes import FakeDownstream
from tests.support.in_process import ChainInProcess
from tests.support.stitched_reference import reference
from tests.support.tiny_cluster import CUTS

CPU = torch.device("cpu")


def new_shard(cluster: ClusterConfig, name: str) -> Shard:
    config, downstream = cluster.shard(name), FakeDownstream()
    loaded = load_stage(cluster, config, CPU)
    neighbours = Neighbours(Membership(cluster), config)
    return build_shard(cluster, config, loaded, CPU, lambda identity, on_event: downstream, Metrics(name), neighbours)


class TestShards:
    def test_shard_with_embedding_is_first_stage_and_others_are_next_stages(self, deep: ClusterConfig) -> None:
        shards = [new_shard(deep, config.name) for config in deep.shards]
        assert [shard.first_stage is not None for shard in shards] == [True, False, False, False]
        assert [shard.next_stage is not None for shard in shards] == [False, True, True, True]

    @pytest.mark.parametrize(
        ("compute", "num_micro_batches", "address", "expected"),
        [
            ({}, 0, "127.0.0.1:0", 1),
            ({}, 0, "10.0.0.1:7001", 2),
            ({"threads": 1}, 0, "127.0.0.1:0", 2),
            ({"threads_while_pipelined": 1}, 0, "127.0.0.1:0", 2),
            ({}, 3, "127.0.0.1:0", 3),
        ],
    )
    def test_shards_that_share_cores_have_one_micro_batch(
        self, cluster: ClusterConfig, compute: dict[str, int], num_micro_batches: int, address: str, expected: int
    ) -> None:
        first, *others = cluster.shards
        fields = {
            "compute": cluster.compute.model_copy(update={"threads": 0} | compute),
            "batching": cluster.batching.model_copy(update={"num_micro_batches": num_micro_batches}),
            "shards": (first, *(shard.model_copy(update={"address": address}) for shard in others)),
        }
        assert resolved_batching(cluster.model_copy(update=fields), CPU).num_micro_batches == expected

    def test_identity_describes_shard(self, cluster: ClusterConfig) -> None:
        shard = new_shard(cluster, "top-0")
        said = shard.identity
        assert (said.shard, said.role, said.first_layer, said.end_layer) == ("top-0", "top", 2, 4)
        assert (said.kv_capacity_tokens, said.kv_block_tokens) == (8192, BLOCK_TOKENS)
        assert (said.wire_dtype, said.device, said.compute_dtype) == (shard_pb2.DTYPE_FLOAT32, "cpu", "float32")
        assert (said.top.id, said.top.hidden_size, said.HasField("bottom")) == ("top", 32, False)
        assert [(route.name, route.bottom_layers, route.top_from) for route in said.routes] == [
            ("weak", 3, 2),
            ("strong", 4, 3),
        ]
        assert shard.kv_free_tokens == 8192

    def test_route_names_stitch_on_shard_that_holds_it(self, cluster: ClusterConfig) -> None:
        bottom, top = (new_shard(cluster, name).identity for name in ("bottom-0", "top-0"))
        held = {
            route.name: Stitch.load(cluster.stitch_file(route) or Path(), CPU, torch.float32).fingerprint
            for route in cluster.routes
        }
        assert {route.name: route.stitch for route in top.routes} == held
        assert {route.stitch for route in bottom.routes} == {""}

    def test_route_names_stitch_on_shards_with_its_adapters(self, deep: ClusterConfig) -> None:
        top_0, top_1 = (new_shard(deep, name).identity for name in ("top-0", "top-1"))
        stated = [{route.name: route.stitch for route in one.routes} for one in (top_0, top_1)]
        assert stated[0]["weak"] == stated[1]["weak"] != ""
        assert stated[1]["strong"] not in ("", stated[1]["weak"])

    def test_parameters_of_all_shards_add_up_to_route(self, cluster: ClusterConfig, deep: ClusterConfig) -> None:
        def total(of: ClusterConfig, route: str) -> int:
            identities = [new_shard(of, place.name).identity for place in of.shards]
            return sum(one.parameters for identity in identities for one in identity.routes if one.name == route)

        bottom, top = (ParameterCount.read(cluster.folder / role) for role in ("bottom", "top"))
        stitch, adapters = 32 * (48 + 1), 2 * 3 * 32 * 2
        weak = bottom.between(0, 3) + stitch + top.between(2, 4) + adapters + top.head
        assert total(cluster, "weak") == total(deep, "weak") == weak
        assert total(cluster, "strong") == total(deep, "strong")
        assert 0 < total(cluster, "weak") != total(cluster, "strong")

    def test_incoming_width_is_that_of_senders_model(self, deep: ClusterConfig) -> None:
        widths = [
            [new_shard(deep, name).incoming_width(role) for role in ("bottom", "top")]
            for name in ("bottom-1", "top-0", "top-1")
        ]
        assert widths == [[48, 48], [48, 32], [48, 32]]

    def test_unpack_converts_to_compute_dtype(self, deep: ClusterConfig) -> None:
        rows = torch.ones(2, 48)
        arrived = new_shard(deep, "bottom-1").unpack(pack(rows, shard_pb2.DTYPE_INT8))
        assert arrived.dtype is torch.float32
        assert torch.equal(arrived, rows)

    def test_stitch_for_another_bottom_is_refused(self, cluster: ClusterConfig) -> None:
        shard = new_shard(cluster, "top-0")
        shard.check_stitch("weak", new_shard(cluster, "bottom-0").identity.bottom)
        shard.check_stitch("medium", inference_pb2.Model())
        with pytest.raises(Incompatible, match="made for the bottom model bottom"):
            shard.check_stitch("weak", inference_pb2.Model(id="other", revision="1"))

    def test_handshake_accepts_shards_of_one_cluster(self, deep: ClusterConfig) -> None:
        shards = [new_shard(deep, place.name) for place in deep.shards]
        for caller, receiver in ((0, 1), (1, 2), (1, 3), (2, 3)):
            hello = shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=shards[caller].identity)
            check_hello(hello, shards[receiver].identity, shards[receiver].check_stitch)
            check_welcome(shard_pb2.Welcome(identity=shards[receiver].identity), shards[caller].identity)

    def test_metrics_are_read_from_shard(self, cluster: ClusterConfig) -> None:
        shard = new_shard(cluster, "bottom-0")
        shard.pool.begin(1, [], 0)
        shard.pool.grow(1, 2048)
        said = generate_latest(shard.metrics.registry).decode()
        for family in ("stitch_sessions_running", "stitch_sessions_waiting", "stitch_busy_seconds_total"):
            assert f'{family}{{shard="bottom-0"}} 0.0' in said
        assert 'stitch_kv_cache_usage_ratio{shard="bottom-0"} 0.25' in said
        assert 'stitch_prefix_tokens_asked_total{shard="bottom-0"} 0.0' in said

    def test_tokenizer_files_are_existing_ones(self, cluster: ClusterConfig) -> None:
        names = [path.name for path in new_shard(cluster, "bottom-0").tokenizer_files]
        assert names == ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]


class TestChains:
    """All shards of a cluster in one thread, with frames as bytes between them."""

    @pytest.fixture(scope="class")
    @classmethod
    def chained(cls, deep: ClusterConfig) -> ChainInProcess:
        return ChainInProcess(deep)

    @pytest.mark.parametrize(
        ("route", "chain"), [("weak", ("bottom-1", "top-0", "top-1")), ("strong", ("bottom-1", "top-1"))]
    )
    def test_chain_generates_tokens_of_reference(
        self, chained: ChainInProcess, tmp_path: Path, route: str, chain: tuple[str, ...]
    ) -> None:
        cluster = chained.cluster
        prompt = [int(token) for token in torch.randint(3, 300, (150,), generator=torch.Generator().manual_seed(1))]
        expected = reference(
            cluster.folder / "bottom",
            cluster.folder / "top",
            cluster.stitch_file(cluster.route(route)),
            *CUTS[route],
        ).generate(prompt, 6)
        assert chained.generate(prompt, route, chain, 6) == expected
        assert chained.idle

    def test_prefix_cached_on_all_shards_is_reused(self, chained: ChainInProcess) -> None:
        chain, prompt = ("bottom-1", "top-1"), list(range(5, 60))
        first = chained.generate(prompt, "strong", chain, 4)
        before = [shard.pool.reused_tokens for shard in chained.shards.values()]
        assert chained.generate(prompt, "strong", chain, 4) == first
        reused = [shard.pool.reused_tokens - one for shard, one in zip(chained.shards.values(), before, strict=True)]
        assert reused == [48, 48, 0, 48]

    def test_prefix_of_another_tenant_is_reused_on_no_shard(self, chained: ChainInProcess) -> None:
        chain, shards = ("bottom-1", "top-1"), chained.shards.values()
        for prompt in [list(range(start, start + 55)) for start in range(5, 17)]:
            first = chained.generate(prompt, "strong", chain, 2, tenant="acme")
            before = [shard.pool.reused_tokens for shard in shards]
            assert chained.generate(prompt, "strong", chain, 2, tenant="other") == first
            assert [shard.pool.reused_tokens for shard in shards] == before

    def test_chain_of_wrong_shards_is_refused(self, chained: ChainInProcess) -> None:
        with pytest.raises(StitchError, match="after bottom-1 route weak passes top-0, then top-1"):
            chained.generate([5, 6, 7], "weak", ("bottom-1", "top-0"), 4)
        assert chained.idle
