"""How many parameters a model reads for one token, layer by layer, from its files' headers. Reads no weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from stitch_server.model.description import read_config
from stitch_server.model.embedding import EMBEDDING
from stitch_server.model.weights import weight_files

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters by place. The embedding counts nothing: one token reads one row of it."""

    layers: tuple[int, ...]
    # The final norm and the language-model head, tied or not.
    head: int

    @classmethod
    def read(cls, folder: Path) -> ParameterCount:
        shapes: dict[str, int] = {}
        for path in weight_files(folder):
            shapes.update(_sizes(path))
        config = read_config(folder)
        layers: Counter[int] = Counter()
        for name, size in shapes.items():
            if found := _LAYER.match(name):
                layers[int(found[1])] += size
        head = shapes[EMBEDDING if config.tie_word_embeddings else "lm_head.weight"]
        norm = shapes.get("model.norm.weight", 0)
        return cls(tuple(layers[index] for index in range(config.num_hidden_layers)), head + norm)

    def between(self, first: int, end: int) -> int:
        """Parameters of layers `[first, end)`."""
        return sum(self.layers[first:end])


def _sizes(path: Path) -> dict[str, int]:
    """Values in every tensor of a safetensors file. Layout: https://huggingface.co/docs/safetensors/index#format"""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
