"""What is saved is what is loaded, and what does not fit is refused by its name."""

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
def path(artefact: RouterArtifact, tmp_path: Path) -> Path:
    path = tmp_path / "made" / "router.safetensors"
    save_router(artefact, path)
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


def test_a_router_comes_back_as_it_was(artefact: RouterArtifact, path: Path) -> None:
    loaded = load_router(path)
    for field in fields(LearnedModel):
        assert np.array_equal(getattr(loaded.model, field.name), getattr(artefact.model, field.name))
    assert replace(loaded, model=artefact.model) == artefact


def test_the_fingerprint_follows_every_tensor_and_the_routes(model: LearnedModel) -> None:
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
def test_metadata_that_does_not_fit_is_refused(path: Path, metadata: dict[str, str], field: str) -> None:
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
def test_tensors_that_do_not_fit_are_refused(path: Path, tensors: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load_router(changed(path, **tensors))
    assert refused.value.field == field


@pytest.mark.parametrize("content", [b"", b"pickle", b"\x80\x04K\x01.", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "router.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"router is .*no safetensors file"):
        load_router(path)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="absent"):
        load_router(tmp_path / "absent.safetensors")


def test_the_metadata_can_be_read_without_this_package(artefact: RouterArtifact, path: Path) -> None:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["routes"]) == ["weak", "strong"]
    assert metadata["fingerprint"] == artefact.fingerprint
