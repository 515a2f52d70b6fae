"""The tokenizer and chat template of a model folder, as training reads them: every token with the role of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer

from stitch.errors import Incompatible
from stitch.tokenizer_files import end_tokens, read
from stitch_training.chat_spans import ContentSpan, content_spans
from stitch_training.data import Role as TokenRole
from stitch_training.data import RoledToken, Turn

# Tokens by which model families close a document in their own training; else the end-of-sequence token serves.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class FolderEncoder:
    """The tokenizer and chat template of a model folder; implements `data.Encoder`."""

    def __init__(self, folder: Path) -> None:
        """Raises Incompatible where the tokenizer has no token that ends a text."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        vocabulary = self._tokenizer.get_vocab()
        separators = [vocabulary[token] for token in SEPARATORS if token in vocabulary]
        end = self._tokenizer.eos_token_id
        if not separators and end is None:
            raise Incompatible(f"the tokenizer in {folder} has no token that ends a text")
        self.separator: int = separators[0] if separators else end
        stated = end_tokens(read(folder), len(self._tokenizer))
        # Tokens that end an answer.
        self.ends: frozenset[int] = frozenset(stated) | ({end} if end is not None else set())

    def encode(self, text: str) -> list[int]:
        """Encodes plain text without special tokens around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_chat(self, turns: Sequence[Turn]) -> list[RoledToken]:
        """Encodes a conversation through the chat template.

        Raises Incompatible where the folder has none, or where the template does not render a message as it is.
        """

        def render(contents: Sequence[str]) -> str:
            given = [replace(turn, content=content) for turn, content in zip(turns, contents, strict=True)]
            return cast(str, self._apply_template(given, tokenize=False))

        try:
            text, spans = content_spans(render, [turn.content for turn in turns])
        except ValueError as error:
            raise Incompatible(f"the tokens of a message can't be told from the template's: {error}") from error
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return self._with_roles(text, encoded["input_ids"], encoded["offset_mapping"], turns, spans)

    def _with_roles(
        self,
        text: str,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        turns: Sequence[Turn],
        spans: Sequence[ContentSpan],
    ) -> list[RoledToken]:
        """Gives every token the role of its characters; one that a message and the template share is the message's."""
        role_of = bytearray(len(text))
        answer_ends = []
        for message, start, end in spans:
            is_answer = turns[message].role == "assistant"
            role_of[start:end] = bytes([TokenRole.ASSISTANT if is_answer else TokenRole.USER]) * (end - start)
            if is_answer and not turns[message].is_cut:
                answer_ends.append(end)
        tokens, previous_end = [], 0
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            # Some tokenizers leave spaces out of the offsets, so that those of a token of spaces are empty.
            role = TokenRole(max(role_of[previous_end if start == end else start : end], default=TokenRole.TEMPLATE))
            if role is TokenRole.TEMPLATE and token_id in self.ends:
                role = TokenRole.END if any(not text[at:start].strip() for at in answer_ends if at <= start) else role
                answer_ends = [at for at in answer_ends if at > start]
            tokens.append(RoledToken(token_id, role))
            previous_end = end
        return tokens

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Encodes a conversation up to the start of the next answer; without a chat template, its plain text."""
        if self._tokenizer.chat_template is None:
            return self.encode("\n".join(turn.content for turn in turns))
        return cast(list[int], self._apply_template(turns, tokenize=True, add_generation_prompt=True))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decodes an answer, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _apply_template(
        self, turns: Sequence[Turn], tokenize: bool, add_generation_prompt: bool = False
    ) -> list[int] | str:
        if self._tokenizer.chat_template is None:
            raise Incompatible("the data hold conversations, but the model has no chat template")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=tokenize, return_dict=False, add_generation_prompt=add_generation_prompt
        )
        return cast(list[int] | str, rendered)
