"""A shard loads its own layers, stitches and adapters, refuses others, and gets the KV cache that suits its device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import ClusterConfig, ComputeConfig, RouteConfig, ShardConfig, load_cluster
from stitch.errors import Incompatible
from stitch_server import build
from stitch_server.attention.cpu import CompiledAttention
from stitch_server.attention.flash import PAGE_TOKENS, FlashAttention
from stitch_server.build import KVCache, allocate_kv_cache, layer_range_of, load_stage
from stitch_server.engine.types import LayerRange
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import Span
from stitch_server.model.decoder import DecoderLayers
from tests.support.cpu_capture import CpuCapture
from tests.support.reference_varlen_kernel import reference_varlen
from tests.support.tiny_cluster import Layers, write_tiny_cluster
from tests.support.tiny_gates import ROUTE, add_skipping_route, write_random_gates
from tests.support.tiny_model import NATIVE_FAMILIES, write_tiny_model

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
CONTEXT, KV_TOKENS = 1000, 8192


@pytest.mark.parametrize(
    ("role", "layers", "cut"),
    [
        ("bottom", (0, 10), LayerRange(0, 6)),
        ("bottom", (0, 4), LayerRange(0, 4)),
        ("bottom", (4, 10), LayerRange(4, 6)),
        ("bottom", (6, 10), None),
        ("top", (0, 10), LayerRange(3, 10)),
        ("top", (4, 10), LayerRange(4, 10)),
        ("top", (2, 4), LayerRange(3, 4)),
        ("top", (0, 3), None),
    ],
)
def test_layer_range_of_a_route_ends_at_its_cut(role: Any, layers: Layers, cut: LayerRange | None) -> None:
    route = RouteConfig(name="weak", bottom_layers=6, top_from=3, stitch="s")
    assert layer_range_of(route, ShardConfig(name="a", role=role, layers=layers, address="a:1")) == cut


def test_first_shard_holds_the_embedding_and_last_the_head(deep: ClusterConfig) -> None:
    ends = [
        (loaded.embedding is not None, loaded.head is not None)
        for loaded in (load_stage(deep, config, CPU) for config in deep.shards)
    ]
    assert ends == [(True, False), (False, False), (False, False), (False, True)]


def test_stages_with_native_layers_are_loaded_without_transformers(tmp_path: Path) -> None:
    files = [write_tiny_cluster(tmp_path / family, family, kernels=False) for family in NATIVE_FAMILIES]
    code = (
        "import sys, torch; from stitch.cluster import load_cluster; from stitch_server.build import load_stage\n"
        "for cluster in map(load_cluster, sys.argv[1:]):\n"
        "    for shard in cluster.shards: load_stage(cluster, shard, torch.device('cpu'))\n"
        "assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()"
    )
    python = [sys.executable, "-c", code, *map(str, files)]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_shards_hold_what_routes_of_one_model_alone_need(tmp_path: Path) -> None:
    layouts = {"bottoms": [(0, 2), (2, 5)], "tops": [(0, 3), (3, 4)]}
    cluster = load_cluster(str(write_tiny_cluster(tmp_path, **layouts, with_ends=True)))
    stages = [load_stage(cluster, config, CPU) for config in cluster.shards]
    ends = [(one.embedding is not None, one.head is not None) for one in stages]
    assert ends == [(True, False), (False, True), (True, False), (False, True)]
    ending = [set(one.ending) for one in stages]
    assert ending == [set(), {"whole"}, set(), {"small", "weak", "strong"}]
    assert [sorted(one.layer_ranges) for one in stages] == [
        ["strong", "weak", "whole"], ["strong", "weak", "whole"], ["small", "weak"], ["small", "strong", "weak"]
    ]  # fmt: skip
    assert [sorted(one.stitches) for one in stages] == [[], [], ["weak"], ["strong"]]
    # The head counts where a route ends.
    whole, strong = (stages[1].describe(cluster.route(name)).parameters for name in ("whole", "strong"))
    assert whole - strong == stages[1].count.between(4, 5) + stages[1].count.head


def test_route_that_ends_before_its_models_last_layer_is_refused(tmp_path: Path) -> None:
    other = write_tiny_cluster(tmp_path)
    fields = json.loads(other.read_text())
    fields["routes"].append({"name": "whole", "bottom_layers": 4})
    other.write_text(json.dumps(fields))
    cluster = load_cluster(str(other))
    with pytest.raises(Incompatible, match="bottom-0 is the last of route whole, but it ends after layer 4 of 5"):
        load_stage(cluster, cluster.shard("bottom-0"), CPU)


def test_shard_holds_the_stitches_of_routes_that_enter_there(deep: ClusterConfig) -> None:
    held = [sorted(load_stage(deep, config, CPU).stitches) for config in deep.shards]
    assert held == [[], [], ["weak"], ["strong"]]


def test_shard_holds_the_adapters_of_its_layers(deep: ClusterConfig) -> None:
    """Only the stitch of `weak` brings some; it enters on the first of both top shards."""
    held = [load_stage(deep, config, CPU).adapters for config in deep.shards]
    assert [{name: (one.first, one.end) for name, one in loaded.items()} for loaded in held] == [
        {}, {}, {"weak": (2, 3)}, {"weak": (3, 4)}
    ]  # fmt: skip


def test_shard_holds_the_layer_ranges_of_routes_that_pass(deep: ClusterConfig) -> None:
    cuts = [load_stage(deep, config, CPU).layer_ranges for config in deep.shards]
    assert cuts == [
        {"weak": LayerRange(0, 2), "strong": LayerRange(0, 2)},
        {"weak": LayerRange(2, 3), "strong": LayerRange(2, 4)},
        {"weak": LayerRange(2, 3)},
        {"weak": LayerRange(3, 4), "strong": LayerRange(3, 4)},
    ]


def test_layers_beyond_the_model_are_refused(cluster: ClusterConfig) -> None:
    config = ShardConfig(name="a", role="bottom", layers=(0, 9), address="a:1")
    with pytest.raises(Incompatible, match="layers 0 to 9 are no range"):
        load_stage(cluster, config, CPU)


def changed(cluster: ClusterConfig, change: Callable[[dict[str, Any]], object], tmp_path: Path) -> ClusterConfig:
    """A cluster file with other fields over the same files."""
    fields = json.loads((cluster.folder / "cluster.json").read_text())
    for model in fields["models"].values():
        model["source"] = str(cluster.folder / model["source"])
    for route in fields["routes"]:
        route["stitch"] = str(cluster.folder / route["stitch"])
    change(fields)
    (tmp_path / "cluster.json").write_text(json.dumps(fields))
    return load_cluster(str(tmp_path / "cluster.json"))


def test_stitch_for_another_cut_is_refused(cluster: ClusterConfig, tmp_path: Path) -> None:
    other = changed(cluster, lambda fields: fields["routes"][0].update(bottom_layers=2), tmp_path)
    with pytest.raises(Incompatible, match="from layer 3 to 2 can't serve a cut from layer 2 to 2"):
        load_stage(other, other.shard("top-0"), CPU)


def test_stitch_for_another_model_is_refused(cluster: ClusterConfig, tmp_path: Path) -> None:
    def swap(fields: dict[str, Any]) -> None:
        fields["models"]["top"] = fields["models"]["bottom"]

    other = changed(cluster, swap, tmp_path)
    with pytest.raises(Incompatible, match="made for the top model"):
        load_stage(other, other.shard("top-0"), CPU)


def test_missing_stitch_is_refused_by_name(cluster: ClusterConfig, tmp_path: Path) -> None:
    other = changed(cluster, lambda fields: fields["routes"][0].update(stitch="gone.safetensors"), tmp_path)
    with pytest.raises(Incompatible, match=r"gone\.safetensors is no stitch"):
        load_stage(other, other.shard("top-0"), CPU)


def test_shard_holds_the_gates_of_its_layers_and_states_what_they_save(tmp_path: Path) -> None:
    layouts = {"bottoms": [(0, 1), (1, 3), (3, 5)], "tops": [(0, 4)]}
    cluster = load_cluster(str(add_skipping_route(write_tiny_cluster(tmp_path, **layouts, with_ends=True))))
    stages = [load_stage(cluster, config, CPU) for config in cluster.shards]
    held = [{name: (one.first, one.end) for name, one in loaded.ffn_skips.items()} for loaded in stages]
    assert held == [{ROUTE: (1, 1)}, {ROUTE: (1, 3)}, {ROUTE: (3, 4)}, {}]
    stated = [[loaded.describe(cluster.route(name)) for name in ("whole", ROUTE)] for loaded in stages[:3]]
    assert [whole.parameters > skipping.parameters for whole, skipping in stated] == [False, True, True]
    assert {whole.ffn_skip for whole, _ in stated} == {""}
    (fingerprint,) = {skipping.ffn_skip for _, skipping in stated}
    assert fingerprint


def test_gates_are_refused_for_layers_of_transformers_and_for_another_model(tmp_path: Path) -> None:
    layouts = {"bottoms": [(0, 5)], "tops": [(0, 4)], "with_ends": True}
    foreign = load_cluster(str(add_skipping_route(write_tiny_cluster(tmp_path / "olmo2", "olmo2", **layouts))))
    with pytest.raises(Incompatible, match="route skipping leaves out FFNs, which layers of olmo2 can't"):
        load_stage(foreign, foreign.shards[0], CPU)
    file = add_skipping_route(write_tiny_cluster(tmp_path / "llama", **layouts))
    write_random_gates(file.parent / "gates.safetensors", file.parent / "top")
    other = load_cluster(str(file))
    with pytest.raises(Incompatible, match="gates of FFNs are made for the model top"):
        load_stage(other, other.shards[0], CPU)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> DecoderLayers:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("model"))
    return DecoderLayers.load(folder, 1, 3, CPU, torch.float32)


def allocated(decoder: DecoderLayers, **compute: Any) -> KVCache:
    return allocate_kv_cache(ComputeConfig(**{"kv_tokens": KV_TOKENS, **compute}), decoder, CONTEXT, CPU)


def uses_flash(kv: KVCache) -> bool:
    return isinstance(kv.attention([Span(0, 1, [0])]), FlashAttention)


class TestKVCacheOnCpu:
    def test_it_has_small_blocks_and_no_graphs(self, decoder: DecoderLayers) -> None:
        kv = allocated(decoder)
        assert (kv.pool.block_tokens, kv.pool.tokens) == (BLOCK_TOKENS, KV_TOKENS)
        assert (kv.store.blocks, kv.graphs) == (kv.pool.blocks, None)
        assert isinstance(kv.attention([Span(0, 1, [0])]), CompiledAttention)
        assert (kv.store.first, kv.store.end) == (1, 3)

    def test_block_size_is_configurable(self, decoder: DecoderLayers) -> None:
        kv = allocated(decoder, kv_block_tokens=PAGE_TOKENS)
        assert (kv.pool.block_tokens, kv.store.block_tokens) == (PAGE_TOKENS, PAGE_TOKENS)
        assert (kv.pool.blocks, kv.store.blocks) == (32, 32)


class TestKVCacheOnGpu:
    @pytest.fixture(autouse=True)
    def queries(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        """The arguments of every look-up of a kernel."""
        queries: list[tuple[Any, ...]] = []

        def find_kernel(*arguments: Any) -> object:
            queries.append(arguments)
            return reference_varlen

        monkeypatch.setattr(build, "varlen_kernel_for", find_kernel)
        monkeypatch.setattr(build, "capture_for", lambda device: CpuCapture())
        return queries

    def test_kernel_is_looked_up_by_device_dtype_and_head_size(
        self, decoder: DecoderLayers, queries: list[tuple[Any, ...]]
    ) -> None:
        assert uses_flash(allocated(decoder, dtype="bfloat16"))
        assert queries == [(CPU, torch.bfloat16, decoder.head_dim)]

    def test_pool_never_hands_out_the_spare_block(self, decoder: DecoderLayers) -> None:
        kv = allocated(decoder)
        assert (kv.pool.block_tokens, kv.pool.tokens) == (PAGE_TOKENS, KV_TOKENS)
        assert kv.store.blocks == kv.pool.blocks + 1
        kv.pool.begin(1, [], 0)
        assert kv.pool.grow(1, KV_TOKENS)
        assert kv.store.blocks - 1 not in kv.pool.blocks_of(1)

    @pytest.mark.parametrize(("kv_tokens", "longest"), [(KV_TOKENS, 1024), (600, 512)])
    def test_graphs_capture_sequences_up_to_the_longest(
        self, decoder: DecoderLayers, kv_tokens: int, longest: int
    ) -> None:
        """Up to the context length, or to the whole cache if that is smaller."""
        graphs = allocated(decoder, kv_tokens=kv_tokens).graphs
        assert graphs is not None
        for end, captured in ((longest, True), (longest + 1, False)):
            spans = [Span(end - 1, 1, [0, 1, 2, 3, 4])]
            hidden, rotary = torch.zeros(1, decoder.hidden_size), decoder.rotary(torch.tensor([end - 1]))
            assert (graphs.run(spans, hidden, rotary, 1, 3, []) is not None) == captured

    @pytest.mark.parametrize("compute", [{"captured_decode": False}, {"kv_block_tokens": BLOCK_TOKENS}])
    def test_graphs_are_off_if_disabled_or_without_kernel(
        self, decoder: DecoderLayers, compute: dict[str, Any]
    ) -> None:
        kv = allocated(decoder, **compute)
        assert kv.graphs is None
        assert uses_flash(kv) == ("kv_block_tokens" not in compute)
