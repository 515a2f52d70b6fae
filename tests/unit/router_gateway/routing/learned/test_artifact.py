"""Tests of the artifact file: round trip, and refusal of everything that does not fit."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from router_gateway.routing.learned.artifact import FORMAT, RouterArtifact, fingerprint_of, load_router, save_router
from router_gateway.routing.learned.model import LearnedModel
from stitch.errors import InvalidRequest


@pytest.fixture
def path(artifact: RouterArtifact, tmp_path: Path) -> Path:
    path = tmp_path / "made" / "router.safetensors"
    save_router(artifact, path)
    return path


def changed(path: Path, metadata: dict[str, str] | None = None, **tensors: Any) -> Path:
    """The same file with other metadata or tensors; a tensor that is None is left out."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        kept = dict(file.metadata())
    found = {**load_file(str(path)), **tensors}
    save_file(
        {name: tensor for name, tensor in found.items() if tensor is not None}, str(path), {**kept, **(metadata or {})}
    )
    return path


def test_saved_router_loads_unchanged(artifact: RouterArtifact, path: Path) -> None:
    loaded = load_router(path)
    for field in fields(LearnedModel):
        assert np.array_equal(getattr(loaded.model, field.name), getattr(artifact.model, field.name))
    assert replace(loaded, model=artifact.model) == artifact


def test_fingerprint_covers_tensors_routes_and_sources(model: LearnedModel) -> None:
    others = [
        replace(model, bias=model.bias + 1),
        replace(model, routes=("weak", "other")),
        replace(model, sources=("x",)),
    ]
    assert len({fingerprint_of(one) for one in [model, *others]}) == 4


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"format": "other/9"}, "router.format"),
        ({"features": "words-only"}, "router.features"),
        ({"fingerprint": "0" * 64}, "router.fingerprint"),
        ({"routes": "[]"}, "router.routes"),
        ({"routes": "[1, 2]"}, "router.routes"),
        ({"routes": "{"}, "router.routes"),
        ({"thresholds": "[]"}, "router.thresholds"),
        ({"thresholds": '["0.5"]'}, "router.thresholds"),
        ({"thresholds": "[NaN]"}, "router.thresholds"),
        ({"gain_percentiles": "[0.5]"}, "router.gain_percentiles"),
        ({"training": "[]"}, "router.training"),
    ],
)
def test_load_router_refuses_invalid_metadata(path: Path, metadata: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load_router(changed(path, metadata))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"bias": None}, "router.tensors"),
        ({"extra": np.zeros(1, np.float32)}, "router.tensors"),
        ({"bias": np.zeros(4, np.float64)}, "router.bias"),
        ({"bias": np.full(4, np.nan, np.float32)}, "router.bias"),
        ({"bias": np.zeros(3, np.float32)}, "router.bias"),
        ({"idf": np.ones((2, 3), np.float32)}, "router.idf"),
        ({"buckets": np.array([5, 5], np.int32)}, "router.buckets"),
        ({"buckets": np.array([-1, 5], np.int32)}, "router.buckets"),
        ({"buckets": np.array([5, 1 << 18], np.int32)}, "router.buckets"),
        ({"topic_source": np.array([1], np.int32)}, "router.topic_source"),
        ({"source_weights": np.zeros(1, np.float32)}, "router.source_weights"),
        ({"surface_scale": np.zeros((2, 21), np.float32)}, "router.surface_scale"),
        ({"topic_weights": np.ones((1, 2), np.float32)}, "router.fingerprint"),
    ],
)
def test_load_router_refuses_invalid_tensors(path: Path, tensors: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load_router(changed(path, **tensors))
    assert refused.value.field == field


@pytest.mark.parametrize("content", [b"", b"pickle", b"\x80\x04K\x01.", b"\xff" * 64])
def test_load_router_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "router.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"router is .*no safetensors file"):
        load_router(path)


def test_load_router_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="absent"):
        load_router(tmp_path / "absent.safetensors")


def test_metadata_is_plain_json(artifact: RouterArtifact, path: Path) -> None:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["routes"]) == ["weak", "strong"]
    assert metadata["fingerprint"] == artifact.fingerprint
