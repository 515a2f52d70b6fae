"""A pair with the shapes of Qwen2.5 7B and 1.5B and random weights, whose speed is that of trained ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import Qwen2Config

from stitch.cluster import ClusterConfig, load_cluster
from stitch.tokenizer_files import tokenizer_hash
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.stitch import Stitch, StitchBinding
from stitch_server.model.weights import INDEX_FILE

DTYPE = torch.bfloat16
# Small enough that hidden states stay finite.
SPREAD = 0.02
# Random values, repeated to fill a matrix: drawing one of a large model takes seconds.
DRAWN = 1 << 22
ROUTE = "strong"
KV_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of one model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tokens: int

    @property
    def config(self) -> Qwen2Config:
        return Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            vocab_size=self.tokens,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=32768,
            # Then no separate head has to be written.
            tie_word_embeddings=True,
        )


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of a pair, and its cut: bottom layers [0, bottom_layers), then top layers from `top_from` on."""

    bottom: Shape
    top: Shape
    bottom_layers: int
    top_from: int


# https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json and that of 1.5B; cut as in deploy/two-servers.toml.
QWEN = Shapes(
    bottom=Shape(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, tokens=151_936),
    top=Shape(layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2, tokens=151_936),
    bottom_layers=20,
    top_from=20,
)
TINY = Shapes(
    bottom=Shape(layers=4, hidden=128, intermediate=256, heads=2, kv_heads=1, tokens=24_000),
    top=Shape(layers=4, hidden=64, intermediate=128, heads=1, kv_heads=1, tokens=24_000),
    bottom_layers=3,
    top_from=3,
)


def write_pair(folder: Path, shapes: Shapes, device: str) -> ClusterConfig:
    """Writes the tensors that the route's shards read (12 GB for `QWEN`) and returns the cluster."""
    _write_model(folder / "bottom", shapes.bottom, 0, shapes.bottom_layers)
    _write_model(folder / "top", shapes.top, shapes.top_from, shapes.top.layers)
    _write_stitch(folder, shapes)
    layers = {"bottom": (0, shapes.bottom_layers), "top": (shapes.top_from, shapes.top.layers)}
    fields = {
        "name": "random-pair",
        "models": {role: {"id": role, "source": str(folder / role)} for role in layers},
        "routes": [
            {
                "name": ROUTE,
                "bottom_layers": shapes.bottom_layers,
                "top_from": shapes.top_from,
                "stitch": "stitch.safetensors",
            }
        ],
        "shards": [
            {"name": f"{role}-0", "role": role, "layers": held, "address": "127.0.0.1:0"}
            for role, held in layers.items()
        ],
        "gateway": {"address": "127.0.0.1:0"},
        "compute": {
            "device": device,
            "dtype": "bfloat16",
            "wire_dtype": "bfloat16",
            # Two shards share one device, so neither may size its cache by all free memory.
            "kv_tokens": KV_TOKENS,
            "kernels": False,
        },
    }
    (folder / "cluster.json").write_text(json.dumps(fields))
    return load_cluster(str(folder / "cluster.json"))


def bytes_per_token(folder: Path, shapes: Shapes) -> int:
    """The bytes of weights that one token of one session reads: layers, stitch, head."""
    bottom, top = (ParameterCount.read(folder / role) for role in ("bottom", "top"))
    stitch = shapes.top.hidden * (shapes.bottom.hidden + 1)
    layers = bottom.between(0, shapes.bottom_layers) + top.between(shapes.top_from, shapes.top.layers)
    return (layers + stitch + top.head) * DTYPE.itemsize


def _write_model(folder: Path, shape: Shape, first: int, end: int) -> None:
    folder.mkdir()
    shape.config.save_pretrained(folder)
    words = {f"w{index}": index for index in range(shape.tokens)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    template = {"chat_template": "{{ messages[-1]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).to(DTYPE)
    ends = {"model.embed_tokens.weight": (shape.tokens, shape.hidden), "model.norm.weight": (shape.hidden,)}
    _write_tensors(folder / "ends.safetensors", ends, drawn)
    file_of = dict.fromkeys(ends, "ends.safetensors")
    for index in range(shape.layers):
        layer, name = dict(_layer(shape, index)), f"layer-{index}.safetensors"
        file_of |= dict.fromkeys(layer, name)
        if first <= index < end:
            _write_tensors(folder / name, layer, drawn)
        else:
            _write_hole(folder / name, layer)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": file_of}))


def _layer(shape: Shape, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    at, width = f"model.layers.{index}", shape.hidden // shape.heads
    for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
        yield f"{at}.self_attn.{name}_proj.weight", (heads * width, shape.hidden)
        yield f"{at}.self_attn.{name}_proj.bias", (heads * width,)
    yield f"{at}.self_attn.o_proj.weight", (shape.hidden, shape.hidden)
    for name in ("gate", "up"):
        yield f"{at}.mlp.{name}_proj.weight", (shape.intermediate, shape.hidden)
    yield f"{at}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", (shape.hidden,)


def _write_hole(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes tensors that nobody reads, as zeros that take no space on the disk."""
    header: dict[str, Any] = {}
    size = 0
    for name, shape in shapes.items():
        begin, size = size, size + torch.Size(shape).numel() * DTYPE.itemsize
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, size]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + size)


def _write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], drawn: Tensor) -> None:
    """Writes norms as ones and every other tensor from the values in `drawn`."""
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        values = torch.ones(size, dtype=DTYPE) if "norm" in name else drawn.repeat(-(-size // DRAWN))[:size].clone()
        tensors[name] = values.view(shape)
    save_file(tensors, file, metadata={"format": "pt"})


def _write_stitch(folder: Path, shapes: Shapes) -> None:
    bottom, top = (ModelDescription.read(folder / role, role) for role in ("bottom", "top"))
    binding = StitchBinding.of(bottom, top, shapes.bottom_layers, shapes.top_from, tokenizer_hash(folder / "bottom"))
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(shapes.top.hidden, shapes.bottom.hidden, generator=draw) * SPREAD
    Stitch(weight, torch.zeros(shapes.top.hidden), binding).save(folder / "stitch.safetensors")
