"""Describes a model from its folder: sizes, family, parameter counts, a fingerprint of its weights.

Reads configuration files and the headers of the weights' files, and a sample of each tensor for the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from stitch.errors import Incompatible
from stitch.v1 import inference_pb2
from stitch_server.model.weights import EMBEDDING, weight_files

SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model's identity and sizes."""

    id: str
    # Equal on every machine that holds the same weights.
    revision: str
    architecture: str
    layers: int
    hidden_size: int
    vocabulary_size: int
    # The longest sequence, in tokens.
    context_length: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def read(cls, folder: Path, model_id: str) -> ModelDescription:
        """Reads the folder. Raises Incompatible if it holds no model."""
        config = read_config(folder)
        return cls(
            id=model_id,
            revision=revision(folder),
            architecture=config.model_type,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocabulary_size=config.vocab_size,
            context_length=config.max_position_embeddings,
            heads=config.num_attention_heads,
            kv_heads=kv_heads(config),
            head_dim=head_dim(config),
        )

    def to_proto(self) -> inference_pb2.Model:
        """Returns the message that describes the model to clients and neighbours."""
        return inference_pb2.Model(
            id=self.id,
            revision=self.revision,
            architecture=self.architecture,
            layers=self.layers,
            hidden_size=self.hidden_size,
            vocabulary_size=self.vocabulary_size,
            context_length=self.context_length,
        )


def read_config(folder: Path) -> PretrainedConfig:
    """Reads the folder's config.json with its family's defaults. Raises Incompatible if there is none."""
    if not (folder / "config.json").is_file():
        raise Incompatible(f"{folder} has no config.json, so it is no model folder")
    config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    return config


def head_dim(config: PretrainedConfig) -> int:
    """Returns the size of an attention head."""
    given: int | None = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def kv_heads(config: PretrainedConfig) -> int:
    """Returns the number of heads of keys and values, which groups of query heads share."""
    given: int | None = getattr(config, "num_key_value_heads", None)
    return given or config.num_attention_heads


def revision(folder: Path) -> str:
    """Returns 16 hex digits over every tensor's name, dtype, shape and first 4 KiB."""
    samples: dict[str, bytes] = {}
    for path in weight_files(folder):
        samples.update(_samples(path))
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()[:16]


def _samples(path: Path) -> dict[str, bytes]:
    """Returns, for each tensor of a safetensors file, its entry in the header and its first bytes.

    Layout: https://huggingface.co/docs/safetensors/index#format
    """
    samples = {}
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(8 + header_bytes + begin)
            sample = file.read(min(SAMPLE_BYTES, end - begin))
            samples[name] = json.dumps([name, entry["dtype"], entry["shape"]]).encode() + sample
    return samples


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """The parameters that a model reads for one token. The embedding counts nothing: a token reads one row of it."""

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
        """Returns the parameters of layers `[first, end)`."""
        return sum(self.layers[first:end])


def _sizes(path: Path) -> dict[str, int]:
    """Returns the size of every tensor of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
