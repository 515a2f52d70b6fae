"""Writes random-weight models of a few layers as model folders that `transformers` reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from stitch.tokenizer_files import tokenizer_hash
from stitch_server.model.adapters import Adapters
from stitch_server.model.description import ModelDescription
from stitch_server.model.stitch import Stitch, StitchBinding
from tests.support.byte_tokenizer import byte_tokenizer, tokenizer_files
from tests.support.tool_templates import FAMILIES

NATIVE_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
TOKENS = byte_tokenizer().get_vocab_size()
CONTEXT_LENGTH = 2048
# Large enough that layers matter and that no two logits are near each other.
INITIAL_RANGE = 0.15
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def write_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    layers: int = 4,
    hidden_size: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    padding_rows: int = 0,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes config.json, weights and a byte-level tokenizer; the same seed, the same bytes. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "vocab_size": TOKENS + padding_rows,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden_size // heads,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": INITIAL_RANGE,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configured = AutoConfig.for_model(family, **given)
        model = AutoModelForCausalLM.from_config(configured).float()  # type: ignore[no-untyped-call]
        _randomize_small_vectors(model)
    model.save_pretrained(folder)
    # Its template is that of the byte tokenizer, but shows tools.
    config_file = {"tokenizer_config.json": json.dumps(FAMILIES["qwen2.5"].config()).encode()}
    for name, data in (tokenizer_files() | config_file).items():
        (folder / name).write_bytes(data)
    return folder


@torch.no_grad()
def _randomize_small_vectors(model: torch.nn.Module) -> None:
    """Randomizes norms (ones at first) and biases (zeros at first), so that a layer that omits them fails."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))


@dataclass(frozen=True)
class TinyPair:
    """Two models with one tokenizer, and a stitch with adapters from depth `bottom_layers` to depth `top_from`."""

    bottom: Path
    top: Path
    stitch_file: Path
    bottom_layers: int
    top_from: int


def write_tiny_pair(
    folder: Path,
    family: str = "llama",
    *,
    bottom_layers: int = 3,
    top_from: int = 2,
    top_family: str | None = None,
    seed: int = 0,
    **config: Any,
) -> TinyPair:
    """A wider, deeper bottom and a narrower, shallower top, padded differently."""
    bottom = write_tiny_model(folder / "bottom", family, layers=5, hidden_size=48, heads=6, seed=seed, **config)
    top = write_tiny_model(folder / "top", top_family or family, layers=4, padding_rows=8, seed=seed + 1, **config)
    file = folder / "stitch.safetensors"
    write_random_stitch(file, bottom, top, bottom_layers, top_from, seed=seed, adapter_rank=3)
    return TinyPair(bottom, top, file, bottom_layers, top_from)


def write_random_stitch(
    file: Path,
    bottom: Path,
    top: Path,
    bottom_layers: int,
    top_from: int,
    *,
    seed: int = 0,
    adapter_rank: int = 0,
) -> Path:
    """A stitch of random values that is bound to these two models at this cut. Ids are the folders' names.

    A stitch with adapters also has a vector for the first token.
    """
    described = ModelDescription.read(bottom, bottom.name), ModelDescription.read(top, top.name)
    generator = torch.Generator().manual_seed(seed)
    widths = described[1].hidden_size, described[0].hidden_size
    weight = torch.randn(widths, generator=generator) * widths[1] ** -0.5
    bias = 0.1 * torch.randn(widths[0], generator=generator)
    binding = StitchBinding.of(*described, bottom_layers, top_from, tokenizer_hash(bottom))
    adapters = random_adapters(described[1], top_from, adapter_rank, generator) if adapter_rank else None
    first = torch.randn(widths[0], generator=generator) if adapter_rank else None
    Stitch(weight, bias, binding, adapters=adapters, first=first).save(file)
    return file


def random_adapters(top: ModelDescription, first: int, rank: int, generator: torch.Generator) -> Adapters:
    """Random adapters, large enough to change the logits."""
    down = torch.randn(top.layers - first, rank, top.hidden_size, generator=generator) * top.hidden_size**-0.5
    up = torch.randn(top.layers - first, top.hidden_size, rank, generator=generator)
    return Adapters(first, down, up)
