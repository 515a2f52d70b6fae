"""A model's tokenizer, chat template and end tokens, from the contents of the files that come with its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from router_gateway.tokenization.chat_template import ChatTemplate
from router_gateway.tokenization.detokenizer import Detokenizer
from stitch.errors import Incompatible

# The files that a shard may send; only `tokenizer.json` is required.
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json")

# The variables by which chat templates refer to special tokens.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Vocabulary:
    """Encodes prompts and makes detokenizers; immutable and thread-safe."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.template = template
        # Ids with which the model ends an answer.
        self.end_tokens = tuple(end_tokens)
        # An upper bound of a token's UTF-8 bytes (byte-level vocabularies spell a byte with up to two bytes).
        self.max_token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Vocabulary:
        """From the contents of FILES, by name. Raises Incompatible, which names the invalid file."""
        tokenizer = _tokenizer(files)
        config = _object(files, "tokenizer_config.json")
        return cls(tokenizer, _chat_template(files, config), _end_tokens(files, config, tokenizer))

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer adds, such as a first one."""
        return self._encode(text, add_special_tokens=True)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered conversation, whose special tokens the template has written."""
        return self._encode(text, add_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        """A new detokenizer for one answer; special tokens have no text."""
        return Detokenizer(self._tokenizer.decode, self._special)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The one encoding call that releases the GIL; 3 MB of text take a second.
        encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encodings[0].ids)


def _tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    if "tokenizer.json" not in files:
        raise Incompatible(f"the first shard sent no tokenizer.json, only: {', '.join(sorted(files)) or 'nothing'}")
    try:
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    # The library raises instances of Exception itself.
    except Exception as error:
        raise Incompatible(f"tokenizer.json can't be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise Incompatible(f"{name} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise Incompatible(f"{name} holds no object, but {type(content).__name__}")
    return content


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> ChatTemplate | None:
    given = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else config.get("chat_template")
    if isinstance(given, list):
        given = next((entry["template"] for entry in given if entry["name"] == "default"), None)
    if given is None:
        return None
    tokens = {name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None}
    try:
        return ChatTemplate(given, tokens)
    except TemplateError as error:
        raise Incompatible(f"the chat template can't be read: {error}") from error


def _end_tokens(files: Mapping[str, bytes], config: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """From the first file that states any, in the order of `transformers`."""
    for name in ("generation_config.json", "config.json"):
        given = _object(files, name).get("eos_token_id")
        if given is not None:
            return list(given) if isinstance(given, list) else [given]
    named = config.get("eos_token")
    found = None if named is None else tokenizer.token_to_id(_content(named))
    return [] if found is None else [found]


def _content(token: str | Mapping[str, str]) -> str:
    """A special token is given as a string, or as an object with `content`."""
    return token if isinstance(token, str) else token["content"]
