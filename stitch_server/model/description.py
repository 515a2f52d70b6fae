"""Describes a model from its folder: sizes, family, parameter counts, a fingerprint of its weights.

Reads configuration files and the headers of the weights' files, and a sample of each tensor for the fingerprint. A
folder is refused by the name of the field or tensor for which its own family would compute something else, or nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from stitch.errors import Incompatible, shown
from stitch.v1 import inference_pb2
from stitch_server.model import hf_layers, llama, llama_config
from stitch_server.model.llama_config import LlamaConfig
from stitch_server.model.rope import inverse_frequencies
from stitch_server.model.weights import EMBEDDING, HEAD, read_header, read_json, stored_tensors, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# That of native layers, or that of a family's own layers.
Config: TypeAlias = "LlamaConfig | PretrainedConfig"
SAMPLE_BYTES = 4096
FAMILIES = sorted((*llama_config.FAMILIES, *hf_layers.FAMILIES))
# What a tensor may be stored as; other types are those of quantized checkpoints.
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
# Fields of config.json that no layers here know, with what they mean where they are set.
UNSERVED_FIELDS = {
    "quantization_config": "quantized checkpoints are not served, but compute.quantization quantizes others",
    "compression_config": "quantized checkpoints are not served, but compute.quantization quantizes others",
    "transformers_weights": "weights of another name than model.safetensors are not read",
    "use_bidirectional_attention": "attention to later tokens generates no text",
}
# Of old checkpoints; the values follow from config.json.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq")


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
        """Reads the folder. Raises Incompatible, which names the field or the tensor, if it holds no model."""
        config = read_config(folder)
        check_tensors(folder, config)
        return cls(
            id=model_id,
            revision=revision(folder),
            architecture=config.model_type,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocabulary_size=config.vocab_size,
            context_length=context_length(config),
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


def read_config(folder: Path) -> Config:
    """Reads the folder's config.json with its family's defaults; code in the folder is never run nor asked for.

    Raises Incompatible, which names the field, for a model that no layers here compute as its family does.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise Incompatible(f"{folder} has no config.json, so it is no model folder")
    fields = read_json(path)
    if (family := fields.get("model_type")) not in FAMILIES:
        raise Incompatible(f"{path}: model_type is {shown(family)}, which is none of {', '.join(FAMILIES)}")
    for name, reason in UNSERVED_FIELDS.items():
        if fields.get(name):
            raise Incompatible(f"{path}: {name} is {shown(fields[name])}: {reason}")
    # Tensors are read as compute.dtype, whatever they were stored as. A head_dim of null is one that is not given.
    ignored = ("dtype", "torch_dtype", *(["head_dim"] if fields.get("head_dim") is None else []))
    fields = {name: value for name, value in fields.items() if name not in ignored}
    if (native := LlamaConfig.read(fields)) is not None:
        return native
    from transformers import CONFIG_MAPPING

    try:
        config: PretrainedConfig = CONFIG_MAPPING[family].from_dict(fields)
        hf_layers.check_supported(config)
    except Incompatible as error:
        raise Incompatible(f"{path}: {error}") from error
    except Exception as error:
        # Each family checks its own fields, with errors of many types.
        raise Incompatible(f"{path} is no configuration of the family {family}: {_one_line(error)}") from error
    return LlamaConfig.of(config) if llama.supports(config) else config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_tensors(folder: Path, config: Config) -> None:
    """Raises Incompatible, which names tensors, unless the files hold exactly those that config.json describes."""
    stored = {name: one for name, one in stored_tensors(folder).items() if not _COMPUTED.search(name)}
    if not 1 <= (layers := config.num_hidden_layers) <= len(stored):
        raise Incompatible(f"{folder / 'config.json'}: num_hidden_layers is {layers}, for {len(stored)} tensors in all")
    try:
        described = _tensor_shapes(config)
    except Exception as error:
        given = f"a {config.model_type} with rope_parameters {config.rope_parameters}"
        raise Incompatible(f"{folder / 'config.json'}: {given} can't be computed: {_one_line(error)}") from error
    for name, one in stored.items():
        if one.dtype not in STORED_DTYPES:
            given = f"tensor {name} of {folder} is stored as {one.dtype}, not as {', '.join(STORED_DTYPES)}"
            raise Incompatible(f"{given}: quantized checkpoints are not served")
    if leftover := stored.keys() - described.keys():
        family = f"a {config.model_type} with this config.json"
        raise Incompatible(f"{folder} holds {_listed(leftover)}, which {family} does not read")
    missing = described.keys() - stored.keys()
    if config.tie_word_embeddings and len(missing & {EMBEDDING, HEAD}) == 1:
        missing -= {EMBEDDING, HEAD}
    if missing:
        raise Incompatible(f"tensor {_listed(missing)} is not in {folder}")
    for name, one in stored.items():
        if one.shape != described[name]:
            raise Incompatible(f"tensor {name} of {folder} is {one.shape}, but config.json means {described[name]}")


def _tensor_shapes(config: Config) -> dict[str, list[int]]:
    """Returns the shape of every tensor by name. Raises any error for fields that do not fit each other."""
    if not isinstance(config, LlamaConfig):
        return hf_layers.tensor_shapes(config)
    inverse_frequencies(config)
    return config.tensor_shapes()


def _listed(names: set[str]) -> str:
    """Returns the first name, with the number of others."""
    return min(names) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def context_length(config: Config) -> int:
    """Returns the longest sequence in tokens.

    That of YaRN is the original one times the factor, since Qwen's recipe leaves max_position_embeddings as it was:
    https://huggingface.co/Qwen/Qwen2.5-7B-Instruct#processing-long-texts
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn" and rope["factor"] is not None:
        return int(rope["original_max_position_embeddings"] * rope["factor"])
    return int(config.max_position_embeddings)


def head_dim(config: Config) -> int:
    """Returns the size of an attention head."""
    given: int | None = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def kv_heads(config: Config) -> int:
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
    """Returns, for each tensor of a safetensors file, its entry in the header and its first bytes."""
    samples = {}
    with path.open("rb") as file:
        for name, stored in read_header(path).items():
            file.seek(stored.begin)
            sample = file.read(min(SAMPLE_BYTES, stored.end - stored.begin))
            samples[name] = json.dumps([name, stored.dtype, stored.shape]).encode() + sample
    return samples


_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FEED_FORWARD = "mlp."


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """The parameters that a model reads for one token. The embedding counts nothing: a token reads one row of it."""

    layers: tuple[int, ...]
    # The final norm and the language-model head, tied or not.
    head: int
    # By layer, of the feed-forward network alone; empty where these are not known.
    feed_forward: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> ParameterCount:
        sizes = {name: prod(stored.shape) for name, stored in stored_tensors(folder).items()}
        config = read_config(folder)
        layers, feed_forward = Counter[int](), Counter[int]()
        for name, size in sizes.items():
            if found := _LAYER.match(name):
                layers[int(found[1])] += size
                feed_forward[int(found[1])] += size if name.startswith(_FEED_FORWARD, found.end()) else 0
        head = sizes[HEAD if HEAD in sizes else EMBEDDING] + sizes.get("model.norm.weight", 0)
        depth = range(config.num_hidden_layers)
        return cls(tuple(layers[index] for index in depth), head, tuple(feed_forward[index] for index in depth))

    def between(self, first: int, end: int | None) -> int:
        """Returns the parameters of layers `[first, end)`; `end` None: up to the last one."""
        return sum(self.layers[first:end])
