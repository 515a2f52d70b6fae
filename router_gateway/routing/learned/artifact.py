"""A learned router as one safetensors file: writes, reads and checks it.

The tensors are the fields of `LearnedModel`; the metadata records how they were trained, so that every figure can be
traced to its data. Nothing is unpickled, and a tensor or metadata entry that does not fit is refused by its name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from router_gateway.routing.learned.features import BUCKETS, SURFACE_FEATURES
from router_gateway.routing.learned.model import LearnedModel
from stitch.errors import InvalidRequest

FORMAT = "stitch-text-router/1"
# Identifies the functions of features.py; a change there needs a new name.
FEATURES = "words-pairs-18-surface-21/1"

_DTYPES = {"buckets": np.dtype(np.int32), "topic_source": np.dtype(np.int32), "weights": np.dtype(np.float16)}
_TENSORS = tuple(field.name for field in fields(LearnedModel) if field.name not in ("routes", "sources"))


@dataclass(frozen=True)
class RouterArtifact:
    """A model, the thresholds that its training proposes, and a record of that training."""

    model: LearnedModel
    # One for each route but the cheapest: the gain from which on it pays for the route's cost.
    thresholds: tuple[float, ...]
    # The strongest route's gain at 0 %, 1 %, … 100 % of the training texts, each predicted out of fold.
    gain_percentiles: tuple[float, ...]
    # Data fingerprints, rows, settings and cross-validated figures; JSON.
    training: dict[str, Any]
    # SHA-256 of the tensors.
    fingerprint: str


def fingerprint_of(model: LearnedModel) -> str:
    """SHA-256 of a model's routes and tensors, in hexadecimal."""
    digest = hashlib.sha256("\n".join([FEATURES, *model.routes, "", *model.sources]).encode())
    for name in _TENSORS:
        digest.update(np.ascontiguousarray(getattr(model, name)).tobytes())
    return digest.hexdigest()


def save_router(artifact: RouterArtifact, path: Path) -> None:
    """Writes an artifact. Raises OSError where the file can't be written."""
    metadata = {
        "format": FORMAT,
        "features": FEATURES,
        "fingerprint": artifact.fingerprint,
        "routes": json.dumps(artifact.model.routes),
        "sources": json.dumps(artifact.model.sources),
        "thresholds": json.dumps(artifact.thresholds),
        "gain_percentiles": json.dumps(artifact.gain_percentiles),
        "training": json.dumps(artifact.training),
    }
    tensors = {name: np.ascontiguousarray(getattr(artifact.model, name)) for name in _TENSORS}
    path.parent.mkdir(parents=True, exist_ok=True)
    # `save_file` would create a file that only its owner can read, and gateways run as other users.
    path.write_bytes(save(tensors, metadata=metadata))


def load_router(path: Path) -> RouterArtifact:
    """Reads and checks an artifact. Raises InvalidRequest, which names the entry that does not fit."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise InvalidRequest("router", str(path), f"it is no safetensors file: {error}") from error
    for name, wanted in (("format", FORMAT), ("features", FEATURES)):
        if metadata.get(name) != wanted:
            raise InvalidRequest(f"router.{name}", metadata.get(name), f"this version reads {wanted}")
    model = LearnedModel(
        routes=_parse_names(metadata, "routes"), sources=_parse_names(metadata, "sources"), **_checked(tensors)
    )
    _check_shapes(model)
    _check_values(model)
    _check_fingerprint(model, metadata.get("fingerprint"))
    thresholds = _parse_floats(metadata, "thresholds", len(model.routes) - 1)
    percentiles = _parse_floats(metadata, "gain_percentiles", 101)
    return RouterArtifact(model, thresholds, percentiles, _parse(metadata, "training", dict), metadata["fingerprint"])


def _checked(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    if set(tensors) != set(_TENSORS):
        raise InvalidRequest("router.tensors", sorted(tensors), f"they must be {', '.join(sorted(_TENSORS))}")
    for name, tensor in tensors.items():
        wanted = _DTYPES.get(name, np.dtype(np.float32))
        if tensor.dtype != wanted:
            raise InvalidRequest(f"router.{name}", str(tensor.dtype), f"it must be {wanted}")
        if not np.isfinite(tensor).all():
            raise InvalidRequest(f"router.{name}", "not finite", "every value must be")
    return tensors


def _check_shapes(model: LearnedModel) -> None:
    rows, sources, topics = len(model.buckets), len(model.sources), len(model.topic_source)
    views, columns = 1 + sources, sources + topics + sources * len(model.routes)
    wanted = {
        "buckets": (rows,),
        "idf": (rows, views),
        "weights": (rows, columns),
        "surface_mean": (views, len(SURFACE_FEATURES)),
        "surface_scale": (views, len(SURFACE_FEATURES)),
        "surface_weights": (len(SURFACE_FEATURES), columns),
        "bias": (columns,),
        "centre": (sources * len(model.routes),),
        "topic_source": (topics,),
        "topic_weights": (topics, len(model.routes)),
        "source_weights": (sources,),
    }
    for name, shape in wanted.items():
        if getattr(model, name).shape != shape:
            raise InvalidRequest(f"router.{name}", getattr(model, name).shape, f"its shape must be {shape}")


def _check_values(model: LearnedModel) -> None:
    buckets, sources = model.buckets, model.topic_source
    if len(buckets) and not (buckets[0] >= 0 and buckets[-1] < BUCKETS and (np.diff(buckets) > 0).all()):
        raise InvalidRequest("router.buckets", "out of order", f"they must rise from 0 to {BUCKETS - 1}")
    if not np.array_equal(np.unique(sources), np.arange(len(model.sources))) or (np.diff(sources) < 0).any():
        raise InvalidRequest("router.topic_source", sources.tolist(), "it must rise and name every source")
    for name in ("surface_scale", "source_weights"):
        if not (getattr(model, name) > 0).all():
            raise InvalidRequest(f"router.{name}", getattr(model, name).min(), "it must be above 0")


def _check_fingerprint(model: LearnedModel, claimed: str | None) -> None:
    found = fingerprint_of(model)
    if found != claimed:
        raise InvalidRequest("router.fingerprint", claimed, f"the tensors have {found}")


def _parse_names(metadata: dict[str, str], field: str) -> tuple[str, ...]:
    names = _parse(metadata, field, list)
    if not names or not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"router.{field}", names, "it must be a list of names")
    return tuple(names)


def _parse_floats(metadata: dict[str, str], field: str, count: int) -> tuple[float, ...]:
    numbers = _parse(metadata, field, list)
    fit = len(numbers) == count and all(isinstance(number, float | int) for number in numbers)
    if not fit or not np.isfinite(numbers).all():
        raise InvalidRequest(f"router.{field}", numbers, f"it must be {count} finite numbers")
    return tuple(map(float, numbers))


def _parse(metadata: dict[str, str], field: str, kind: type[Any]) -> Any:
    try:
        value = json.loads(metadata.get(field, ""))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"router.{field}", metadata.get(field), "it must be JSON") from error
    if not isinstance(value, kind):
        raise InvalidRequest(f"router.{field}", value, f"it must be a {kind.__name__}")
    return value
