"""Cluster files: their fields and defaults, and the errors of invalid ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stitch.cluster import ClusterConfig, ModelConfig, load_cluster, presets
from stitch.errors import InvalidRequest

ROOT = Path(__file__).parents[3]


def fields(**changes: Any) -> dict[str, Any]:
    """A cluster of two bottom stages and two replicas of one top stage, with `changes` to its sections."""
    whole: dict[str, Any] = {
        "name": "pair",
        "models": {"bottom": {"id": "org/large", "source": "large"}, "top": {"id": "org/small", "source": "small"}},
        "routes": [
            {"name": "weak", "bottom_layers": 4, "top_from": 3, "stitch": "stitches/weak.safetensors"},
            {"name": "strong", "bottom_layers": 8, "top_from": 8},
        ],
        "shards": [
            {"name": "bottom-0", "role": "bottom", "layers": [0, 4], "address": "127.0.0.1:0"},
            {"name": "bottom-1", "role": "bottom", "layers": [4, 8], "address": "127.0.0.1:0"},
            {"name": "top-0", "role": "top", "layers": [3, 12], "address": "127.0.0.1:0"},
            {"name": "top-1", "role": "top", "layers": [3, 12], "address": "127.0.0.1:0"},
        ],
        "gateway": {"address": "127.0.0.1:0"},
    }
    return {**whole, **changes}


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "pair.json"
    path.write_text(json.dumps(content))
    return str(path)


def cluster(folder: Path, **changes: Any) -> ClusterConfig:
    return load_cluster(write(folder, fields(**changes)))


def test_every_preset_is_valid() -> None:
    assert "smollm2" in presets()
    for name in presets():
        assert load_cluster(name).name == name


def test_toml_and_json_load_equal_clusters(tmp_path: Path) -> None:
    preset = load_cluster("smollm2")
    path = tmp_path / "copy.json"
    path.write_text(json.dumps(preset.model_dump(mode="json", exclude={"folder"})))
    assert load_cluster(str(path)) == preset.model_copy(update={"folder": tmp_path, "file": path})


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_cluster_file_is_utf_8_with_or_without_byte_order_mark(tmp_path: Path, ending: str) -> None:
    toml = (resources.files("stitch") / "presets" / "smollm2.toml").read_text(encoding="utf-8")
    text = "# ü → \u2028\n" + toml.replace('id = "HuggingFaceTB/', 'id = "Ünï/')
    (tmp_path / "pair.toml").write_bytes(text.replace("\n", ending).encode("utf-8-sig"))
    (tmp_path / "pair.json").write_bytes(json.dumps(fields(), ensure_ascii=False).encode("utf-8-sig"))
    script = (
        f"from stitch.cluster import *; print(ascii(load_cluster({str(tmp_path / 'pair.toml')!r}).models.bottom.id))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == ascii(load_cluster(str(tmp_path / "pair.toml")).models.bottom.id) + "\n"
    assert "Ünï" in load_cluster(str(tmp_path / "pair.toml")).models.bottom.id
    assert load_cluster(str(tmp_path / "pair.json")).name == "pair"


def test_missing_sections_have_defaults(tmp_path: Path) -> None:
    found = cluster(tmp_path)
    assert (found.compute.dtype, found.compute.threads, found.gateway.fallback_route) == ("float32", 0, None)


def test_route_and_shard_are_found_by_name(tmp_path: Path) -> None:
    found = cluster(tmp_path)
    assert found.route("weak").top_from == 3
    assert found.shard("top-1").layers == (3, 12)


def test_unknown_route_error_lists_known_routes(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^route is 'medium', but this cluster has: weak, strong, auto$"):
        cluster(tmp_path).route("medium")


def test_unknown_shard_error_lists_known_shards(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^shard is 'top-9', but the cluster file has: bottom-0, bottom-1, top-0"):
        cluster(tmp_path).shard("top-9")


def test_stitch_file_is_relative_to_cluster_file(tmp_path: Path) -> None:
    found = cluster(tmp_path)
    assert found.stitch_file(found.route("weak")) == tmp_path / "stitches/weak.safetensors"
    assert found.stitch_file(found.route("strong")) is None


def skipping(**route: Any) -> list[dict[str, Any]]:
    """The routes, with gates of FFNs for the second one, or for another one."""
    first, second = fields()["routes"]
    return [first, {**second, "ffn_skip": {"file": "gates.safetensors", "share": 0.2}, **route}]


def test_file_of_gates_is_relative_to_cluster_file(tmp_path: Path) -> None:
    found = cluster(tmp_path, routes=skipping())
    assert found.ffn_skip_file(found.route("strong")) == tmp_path / "gates.safetensors"
    assert found.ffn_skip_file(found.route("weak")) is None


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        ({"top_from": 3, "stitch": "a.safetensors"}, "route strong has a stitch, and gates of FFNs are trained for"),
        ({"ffn_skip": {"file": "gates.safetensors", "share": 1.0}}, "less than 1"),
        ({"ffn_skip": {"file": "gates.safetensors"}}, "required"),
    ],
)
def test_gates_that_do_not_fit_the_route_are_refused(tmp_path: Path, route: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        cluster(tmp_path, routes=skipping(**route))


@pytest.mark.parametrize(
    ("route", "stages"),
    [
        ("weak", [["bottom-0"], ["top-0", "top-1"]]),
        ("strong", [["bottom-0"], ["bottom-1"], ["top-0", "top-1"]]),
    ],
)
def test_stages_are_shards_that_route_needs(tmp_path: Path, route: str, stages: list[list[str]]) -> None:
    found = cluster(tmp_path)
    chain = found.stages(found.route(route))
    assert [[shard.name for shard in stage] for stage in chain] == stages


def test_stages_of_one_model_alone_are_its_shards(tmp_path: Path) -> None:
    routes = [{"name": "small", "bottom_layers": 0, "top_from": 0}, {"name": "whole", "bottom_layers": 8}]
    shards = [shard("b-0", "bottom", 0, 4), shard("b-1", "bottom", 4, 8), shard("t-0", "top", 0, 12)]
    found = cluster(tmp_path, routes=routes, shards=shards)
    stages = {route.name: [stage[0].name for stage in found.stages(route)] for route in found.routes}
    assert stages == {"small": ["t-0"], "whole": ["b-0", "b-1"]}
    assert [found.beginning_on(one.stage) for one in found.shards] == [{"whole"}, set(), {"small"}]
    assert [found.ending_on(one.stage) for one in found.shards] == [set(), {"whole"}, {"small"}]
    assert found.earliest_cut == 8


def test_one_shard_serves_a_route_of_the_bottom_alone(tmp_path: Path) -> None:
    routes = [{"name": "whole", "bottom_layers": 8}]
    found = cluster(tmp_path, routes=routes, shards=[shard("b-0", "bottom", 0, 8)])
    assert [[one.name for one in stage] for stage in found.stages(found.route("whole"))] == [["b-0"]]


def test_stages_omit_top_shard_below_top_from(tmp_path: Path) -> None:
    shards = [
        *fields()["shards"][:2],
        {"name": "top-low", "role": "top", "layers": [3, 8], "address": "127.0.0.1:0"},
        {"name": "top-high", "role": "top", "layers": [8, 12], "address": "127.0.0.1:0"},
    ]
    found = cluster(tmp_path, shards=shards)
    names = {route.name: [stage[0].name for stage in found.stages(route)] for route in found.routes}
    assert names == {
        "weak": ["bottom-0", "top-low", "top-high"],
        "strong": ["bottom-0", "bottom-1", "top-high"],
    }


def shard(name: str, role: str, first: int, end: int) -> dict[str, Any]:
    return {"name": name, "role": role, "layers": [first, end], "address": "127.0.0.1:0"}


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"routes": []}, "routes", "at least 1 item"),
        ({"routes": [{"name": "auto", "bottom_layers": 4, "top_from": 4}]}, "routes.0", "can't name a route"),
        ({"routes": [{"name": "A b", "bottom_layers": 4, "top_from": 4}]}, "routes.0.name", "match pattern"),
        ({"routes": [{"name": "a", "bottom_layers": -1, "top_from": 0}]}, "routes.0.bottom_layers", "greater than"),
        ({"routes": [{"name": "a", "bottom_layers": 0}]}, "routes.0", "a has no bottom layer.*top_from must be 0"),
        ({"routes": [{"name": "a", "bottom_layers": 0, "top_from": 1}]}, "routes.0", "top_from must be 0"),
        ({"routes": [{"name": "a", "bottom_layers": 8, "stitch": "s"}]}, "routes.0", "one model alone.* no stitch"),
        ({"routes": [{"name": "a", "bottom_layers": 4}]}, "cluster", "has no top and 4 bottom layers, but .* hold 8"),
        ({"routes": [{"name": "a", "bottom_layers": 0, "top_from": 0}]}, "cluster", "a passes top layer 0, which no"),
        (
            {
                "routes": [{"name": "a", "bottom_layers": 0, "top_from": 0}, {"name": "b", "bottom_layers": 8}],
                "shards": [shard("a", "bottom", 0, 8), shard("b", "top", 0, 12)],
                "gateway": {"address": "x:0", "probe": "p"},
            },
            "cluster",
            "a first shard of the bottom can't choose route a, which has none of the bottom's layers .* after layer 8",
        ),
        (
            {"routes": [{"name": "a", "bottom_layers": 4, "top_from": 6}]},
            "routes.0",
            "route a leaves out .* needs a stitch",
        ),
        (
            {"routes": [{"name": "a", "bottom_layers": 9, "top_from": 9}]},
            "cluster",
            "a passes bottom layer 8, which no",
        ),
        ({"routes": [{"name": "a", "bottom_layers": 4, "top_from": 4}] * 2}, "cluster", "two routes have one name"),
        ({"shards": [shard("a", "bottom", 0, 8), shard("a", "top", 3, 12)]}, "cluster", "two shards have one name"),
        ({"shards": [shard("a", "bottom", 0, 3), shard("b", "bottom", 5, 8)]}, "cluster", "passes bottom layer 3"),
        (
            {"shards": [shard("a", "bottom", 0, 6), shard("b", "bottom", 5, 8), shard("c", "top", 3, 12)]},
            "cluster",
            "bottom shards hold layers 0 to 6 and 5 to 8: two ranges must be equal, of replicas, or disjoint",
        ),
        (
            {"shards": [shard("a", "bottom", 0, 8), shard("b", "top", 5, 5)]},
            "shards.1",
            "layers 5 to 5 are an empty range",
        ),
        ({"shards": [shard("a", "middle", 0, 8)] * 2}, "shards.0.role", "'bottom' or 'top'"),
        ({"gateway": {"address": "x:0", "metrics_port": 70000}}, "gateway.metrics_port", "less than or equal to 65535"),
        ({"gateway": {"address": "x:0", "fallback_route": "medium"}}, "cluster", "names no route: medium"),
        ({"gateway": {"address": "x:0", "prot": 1}}, "gateway.prot", "not permitted"),
        ({"compute": {"dtype": "float8"}}, "compute.dtype", "'float32', 'bfloat16' or 'float16'"),
        ({"compute": {"threads": "2"}}, "compute.threads", "valid integer"),
    ],
)
def test_invalid_cluster_error_names_field_and_reason(
    tmp_path: Path, changes: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        cluster(tmp_path, **changes)
    assert caught.value.field == field


def test_route_needs_no_top_layer_below_top_from(tmp_path: Path) -> None:
    routes = [{"name": "a", "bottom_layers": 8, "top_from": 8}]
    found = cluster(tmp_path, routes=routes, shards=[shard("a", "bottom", 0, 8), shard("b", "top", 8, 12)])
    assert [stage[0].name for stage in found.stages(found.route("a"))] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content"), [("c.toml", "name = "), ("c.json", "{"), ("c.json", "[1]"), ("c.toml", "\ud800")]
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidRequest, match="can't be read") as caught:
        load_cluster(str(path))
    assert caught.value.value == str(path)


def test_missing_file_error_lists_presets() -> None:
    with pytest.raises(
        InvalidRequest, match=r"^cluster is 'nowhere.toml', but it is no file and none of the presets: "
    ):
        load_cluster("nowhere.toml")


def test_cluster_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_cluster("smollm2").name = "other"  # type: ignore[misc]


class TestProbe:
    """Shards that decide by the states at the earliest cut."""

    def test_probe_files_are_relative_to_cluster_file(self, tmp_path: Path) -> None:
        gateway = {"address": "127.0.0.1:0", "probe": "probe.safetensors", "probe_thresholds": "thresholds.json"}
        found = cluster(tmp_path, gateway=gateway)
        assert found.earliest_cut == 4
        assert (found.probe_file, found.probe_thresholds_file) == (
            tmp_path / "probe.safetensors",
            tmp_path / "thresholds.json",
        )
        assert cluster(tmp_path).probe_file is None

    def test_probe_and_router_exclude_each_other(self, tmp_path: Path) -> None:
        gateway = {"address": "127.0.0.1:0", "probe": "probe.safetensors", "router": "router.safetensors"}
        with pytest.raises(InvalidRequest, match="exclude each other"):
            cluster(tmp_path, gateway=gateway)

    def test_probe_thresholds_need_probe(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="probe_thresholds needs"):
            cluster(tmp_path, gateway={"address": "127.0.0.1:0", "probe_thresholds": "thresholds.json"})

    def test_first_shard_must_reach_earliest_cut(self, tmp_path: Path) -> None:
        shards = fields()["shards"]
        shards[0]["layers"], shards[1]["layers"] = [0, 3], [3, 8]
        gateway = {"address": "127.0.0.1:0", "probe": "probe.safetensors"}
        assert cluster(tmp_path, shards=shards)
        with pytest.raises(InvalidRequest, match="after layer 4, but shard bottom-0 ends at 3"):
            cluster(tmp_path, shards=shards, gateway=gateway)


def test_model_source_has_what_the_source_must_be(tmp_path: Path) -> None:
    plain = ModelConfig(id="x", source="model.gguf")
    assert plain.pinned_source == "model.gguf"
    pinned = ModelConfig(id="x", source="model.gguf", sha256="0" * 64)
    assert pinned.pinned_source == f"model.gguf#sha256={'0' * 64}"
    assert ModelConfig(id="x", source="a/b", commit="1" * 40).pinned_source == f"a/b@{'1' * 40}"
    with pytest.raises(ValidationError, match="sha256"):
        ModelConfig(id="x", source="model.gguf", sha256="0")
    cluster = load_cluster("smollm2")
    models = cluster.models.model_copy(update={"bottom": pinned})
    (tmp_path / "model.gguf").touch()
    moved = cluster.model_copy(update={"models": models, "folder": tmp_path})
    assert moved.model_source("bottom") == f"{tmp_path / 'model.gguf'}#sha256={'0' * 64}"
