"""A model folder's tokenizer, as packing wants it. Knows no file of training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, GenerationConfig

from stitch.errors import Incompatible
from stitch_training.data import Turn

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

        generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
        ends = generation.eos_token_id if generation is not None else end
        # Tokens that end an answer.
        self.ends: frozenset[int] = frozenset(ends if isinstance(ends, list) else [ends] if ends is not None else [])

    def encode(self, text: str) -> list[int]:
        """Plain text as it is, without special tokens around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_chat(self, turns: Sequence[Turn]) -> list[int]:
        """A conversation through the chat template. Raises Incompatible where the folder has none."""
        return self._through_template(turns, answered=True)

    def encode_question(self, text: str) -> list[int]:
        """A conversation of one turn up to where the answer begins; plain text where the folder has no template."""
        if self._tokenizer.chat_template is None:
            return self.encode(text)
        return self._through_template([Turn("user", text)], answered=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _through_template(self, turns: Sequence[Turn], answered: bool) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise Incompatible("the data hold conversations, but the model has no chat template")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        ids = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=not answered
        )
        return cast(list[int], ids)
