"""RoPE's frequencies are those of `transformers`, bit by bit, for every scaling that native layers support."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from stitch_server.model.llama_config import ROPE_TYPES, LlamaConfig
from stitch_server.model.rope import inverse_frequencies

THETAS = (1e4, 10000, 5e5, 1e6, 1000000)
SCALINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "default": {},
    "linear": {"factor": (1.0, 2, 3.7, 8.0)},
    "llama3": {
        "factor": (2.0, 8, 32.0),
        "low_freq_factor": (1.0, 2),
        "high_freq_factor": (4.0, 3, 2.5),
        "original_max_position_embeddings": (16, 512, 8192),
    },
    "yarn": {
        "factor": (None, 1.0, 2.5, 4, 40.0),
        "original_max_position_embeddings": (64, 4096, 32768),
        "attention_factor": (None, 0.7, 1.2),
        "beta_fast": (None, 32, 16.5),
        "beta_slow": (None, 1, 2.5),
        "mscale": (None, 0.707, 1.0),
        "mscale_all_dim": (None, 1.0, 0.5),
        "truncate": (True, False),
    },
}


def their_config(kind: str, draw: random.Random) -> TheirConfig:
    rope = {name: draw.choice(values) for name, values in SCALINGS[kind].items()}
    rope = {name: value for name, value in rope.items() if value is not None or draw.random() < 0.5 or name == "factor"}
    heads, head_dim = 4, draw.choice((8, 64, 80, 128))
    return TheirConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=draw.choice((2048, 131072)),
        rope_parameters={"rope_type": kind, "rope_theta": draw.choice(THETAS), **rope},
    )


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_frequencies_are_bit_equal_to_those_of_transformers(kind: str) -> None:
    draw = random.Random(kind)
    for _ in range(100):
        theirs = their_config(kind, draw)
        frequencies, radius = inverse_frequencies(LlamaConfig.of(theirs))
        embedding = LlamaRotaryEmbedding(theirs)
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, embedding.inv_freq), theirs.rope_parameters
        assert radius == embedding.attention_scaling, theirs.rope_parameters


def test_scaling_of_a_part_of_a_head_is_refused() -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        inverse_frequencies(LlamaConfig.of(TheirConfig(rope_parameters=rope)))
