"""Writes cluster files of tiny random pairs with two routes, or four with both ends, and at least two shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stitch.cluster import BatchingConfig
from tests.support.tiny_model import write_random_stitch, write_tiny_pair

# Route name to (bottom_layers, top_from); the bottom has 5 layers and is wider than the top, which has 4.
CUTS = {"weak": (3, 2), "strong": (4, 3)}
BOTTOM, TOP = (0, 4), (2, 4)
# The same with both models alone, which need all layers of both.
ENDS = {"small": (0, 0), **CUTS, "whole": (5, None)}
WHOLE_BOTTOM, WHOLE_TOP = (0, 5), (0, 4)
Layers = tuple[int, int]


def write_tiny_cluster(
    folder: Path,
    family: str = "llama",
    *,
    name: str = "tiny",
    bottoms: Sequence[Layers] = (BOTTOM,),
    tops: Sequence[Layers] = (TOP,),
    model: Mapping[str, Any] | None = None,
    with_ends: bool = False,
    **compute: Any,
) -> Path:
    """Writes the pair, its stitches and `cluster.json`; returns the latter.

    One shard for every range of layers, named bottom-0, bottom-1, …, top-0, …; equal ranges are replicas.
    `model` goes into both models' configurations, `compute` into the sections `compute` and `batching`.
    `with_ends` adds the routes of both models alone, for shards of all layers.
    """
    batching = {name: compute.pop(name) for name in BatchingConfig.model_fields if name in compute}
    bottom_layers, top_from = CUTS["weak"]
    pair = write_tiny_pair(folder, family, bottom_layers=bottom_layers, top_from=top_from, **(model or {}))
    stitches = {"weak": pair.stitch_file, "strong": folder / "strong.safetensors"}
    write_random_stitch(stitches["strong"], pair.bottom, pair.top, *CUTS["strong"], seed=1)
    fields = {
        "name": name,
        "models": {"bottom": _model(pair.bottom), "top": _model(pair.top)},
        "routes": [
            {"name": route, "bottom_layers": cut[0], "top_from": cut[1]}
            | ({"stitch": stitches[route].name} if route in stitches else {})
            for route, cut in (ENDS if with_ends else CUTS).items()
        ],
        "shards": [*_shards("bottom", bottoms), *_shards("top", tops)],
        "gateway": {"address": "127.0.0.1:0", "http": "127.0.0.1:0"},
        # Small enough that a prompt of some hundred tokens is prefilled in many chunks.
        "compute": {"kv_tokens": 8192, "threads": 1, **compute},
        "batching": {"max_merged_tokens": 64, **batching},
    }
    file = folder / "cluster.json"
    file.write_text(json.dumps(fields))
    return file


def _model(folder: Path) -> dict[str, str]:
    return {"id": folder.name, "source": folder.name}


def _shards(role: str, ranges: Sequence[Layers]) -> list[dict[str, Any]]:
    return [
        {"name": f"{role}-{index}", "role": role, "layers": list(layers), "address": "127.0.0.1:0"}
        for index, layers in enumerate(ranges)
    ]
