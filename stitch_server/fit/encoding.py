"""A model folder's tokenizer, as packing wants it. Knows no file of training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer

from stitch.errors import Incompatible
from stitch_server.fit.reading import Turn

# Tokens by which families close a document in their own training; else the end of an answer serves.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class FolderEncoder:
    """Encodes with the tokenizer and the chat template of a model folder."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        known = self._tokenizer.get_vocab()
        found = [known[token] for token in SEPARATORS if token in known]
        end = self._tokenizer.eos_token_id
        if not found and end is None:
            raise Incompatible(f"the tokenizer in {folder} has no token that ends a text")
        self.separator: int = found[0] if found else end

    def encode(self, text: str) -> list[int]:
        """Plain text as it is, without special tokens around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_chat(self, turns: Sequence[Turn]) -> list[int]:
        """A conversation through the chat template. Raises Incompatible where the folder has none."""
        if self._tokenizer.chat_template is None:
            raise Incompatible("the data hold conversations, but the model has no chat template")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        ids = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        return cast(list[int], ids)
