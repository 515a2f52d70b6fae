"""Prompts to what a probe sees of them. Knows no label.

A prompt is tokenized as the gateway does it, and its first tokens pass the bottom's layers up to the earliest cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stitch.errors import Incompatible, InvalidRequest
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.embedding_and_head import Embedding
from stitch_server.model.probe import features, pooled
from stitch_training.recovery import Numbers
from stitch_training.whole_model import CausalSequences

# Prompts of one length that pass the layers together.
BATCH_PROMPTS = 4


@dataclass(frozen=True)
class PromptReader:
    """A bottom model's lower layers, and how its prompts become tokens."""

    embedding: Embedding
    layers: DecoderLayers
    encode: Callable[[str], list[int]]
    # Of each prompt so many are read.
    tokens: int

    @classmethod
    def load(cls, folder: Path, layer: int, tokens: int, dtype: torch.dtype, chat: bool) -> PromptReader:
        """Layers [0, layer) on the processor; `chat`: every prompt is the first turn of a conversation.

        Raises Incompatible where the model has no such layers, or no chat template where one is needed.
        """
        cpu = torch.device("cpu")
        layers = DecoderLayers.load(folder, 0, layer, cpu, dtype)
        encode = chat_encoder(folder) if chat else plain_encoder(folder)
        return cls(Embedding.load(folder, cpu, dtype), layers, encode, tokens)

    def read(self, prompts: Sequence[str], progress: Callable[[int, int], None]) -> Numbers:
        """`[prompts, features]`; `progress(done, of)` is called after every batch."""
        return self.see([self.encode(prompt) for prompt in prompts], progress)

    def see(self, prompts: Sequence[Sequence[int]], progress: Callable[[int, int], None]) -> Numbers:
        """The same of token ids."""
        ids = [prompt[: self.tokens] for prompt in prompts]
        empty = [index for index, one in enumerate(ids) if not one]
        if empty:
            raise InvalidRequest("data", f"prompt {empty[0] + 1}", "it must have a token at least")
        seen, done = np.empty((len(ids), features(self.layers.hidden_size))), 0
        for batch in _batches(ids):
            seen[batch] = self._pooled([ids[index] for index in batch])
            done += len(batch)
            progress(done, len(ids))
        return seen

    @torch.inference_mode()
    def _pooled(self, ids: Sequence[Sequence[int]]) -> Numbers:
        """`[prompts, features]` of prompts of one length."""
        tokens = torch.tensor(ids)
        count, length = tokens.shape
        rotary = self.layers.rotary(torch.arange(length).repeat(count))
        hidden = self.embedding(tokens.flatten())
        states = self.layers.run(hidden, rotary, CausalSequences(count), 0, self.layers.end).view(count, length, -1)
        found: Numbers = torch.stack([pooled(one) for one in states]).double().numpy()
        return found


def plain_encoder(folder: Path) -> Callable[[str], list[int]]:
    """As the gateway tokenizes a `prompt`: the text, with what the tokenizer puts around it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=True).ids)


def chat_encoder(folder: Path) -> Callable[[str], list[int]]:
    """As the gateway tokenizes a `chat` of one turn. Raises Incompatible where the folder has no template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise Incompatible(f"{folder} has no chat template, so prompts are no conversations")

    def encode(text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        return list(map(int, ids))

    return encode


def _batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of prompts, each batch of one length."""
    by_length: dict[int, list[int]] = {}
    for index, one in enumerate(ids):
        by_length.setdefault(len(one), []).append(index)
    return [
        members[start : start + BATCH_PROMPTS]
        for _, members in sorted(by_length.items())
        for start in range(0, len(members), BATCH_PROMPTS)
    ]
