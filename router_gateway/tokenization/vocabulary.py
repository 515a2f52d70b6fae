"""A model's tokenizer, chat template and end tokens, from the contents of the files that come with its weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

from router_gateway.tokenization.chat_template import ChatTemplate, TemplateRefusal, Tool, Turn
from router_gateway.tokenization.control_tokens import ControlTokens, RenderedChat
from router_gateway.tokenization.detokenizer import Detokenizer
from router_gateway.tokenization.tool_calls import ToolSyntax, tool_syntax
from stitch import tokenizer_files
from stitch.errors import Incompatible
from stitch.grammar import GrammarCompiler
from stitch.tokenizer_files import CONFIG, Files

# The byte that a token of this name stands for where the decoder has a step `ByteFallback`.
_BYTE = re.compile("<0x[+0-9A-Fa-f][0-9A-Fa-f]>")
# The letters with which byte-level vocabularies spell bytes, as the decoder reads them.
_LETTERS = {
    letter: byte
    for byte, letter in zip(
        (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x21), *range(0x7F, 0xA1), 0xAD),
        (*map(chr, (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))), *map(chr, range(0x100, 0x144))),
        strict=True,
    )
}
# An answer that no template contains, with which its end-of-turn token is found.
_ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}answer"
# A text with more characters for each token of the limit is encoded in parts first; usual texts have 2 to 5.
CHARACTERS_PER_TOKEN = 6
# A part may end within a word, whose tokens are then others.
PART_MARGIN_TOKENS = 64


class TextTooLong(Exception):
    """A text has more tokens than fit; `tokens` is the number that was found before the rest was left out."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"more than {tokens:,} tokens")
        self.tokens = tokens


class Vocabulary:
    """Encodes prompts and makes detokenizers; immutable and thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        silent: frozenset[int],
        template: ChatTemplate | None,
        template_absence: str,
        end_tokens: Sequence[int],
        response_template: dict[str, Any] | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
    ) -> None:
        """`response_template` is that of `transformers`, by which an answer is parsed."""
        self._tokenizer = tokenizer
        self._silent = silent
        self._bytes = _byte_tokens(tokenizer)
        self._added = tokenizer.get_added_tokens_decoder()
        self._spells_bytes = _has_step(tokenizer, "ByteLevel")
        self._token_bytes: dict[int, bytes] = {}
        self.template = template
        self._control = ControlTokens(tokenizer, template)
        # Why there is no template.
        self.template_absence = template_absence
        # Ids with which the model ends an answer.
        self.end_tokens = tuple(end_tokens)
        self._response_template = response_template
        # Ids by content.
        self.added_tokens = {one.content: id for id, one in tokenizer.get_added_tokens_decoder().items()}
        self.grammars = GrammarCompiler(tokenizer.to_str)
        # What the model's generation_config.json sets, by the names of `Sampling`.
        self.sampling_defaults = sampling_defaults or {}
        # An upper bound of a token's UTF-8 bytes (byte-level vocabularies spell a byte with up to two bytes).
        self.max_token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())
        # Token ids are below this.
        self.size = max(tokenizer.get_vocab().values()) + 1

    @classmethod
    def from_files(cls, files: Files) -> Vocabulary:
        """From the contents of a model's tokenizer files, by name. Raises Incompatible, which names the invalid one."""
        tokenizer = _tokenizer(files)
        silent = _special(tokenizer) | _unused(tokenizer)
        special = tokenizer_files.special_tokens(
            files, tokenizer_files.json_object(files, "tokenizer.json")["added_tokens"]
        )
        tokenizer.add_tokens([AddedToken(**token) for token in special.added])
        template, absence = _chat_template(files, special.named)
        ends = _end_tokens(files, tokenizer, special.named.get("eos_token"), template)
        # A token that was special once stays so for the decoder.
        given = tokenizer_files.json_object(files, CONFIG).get("response_template")
        response_template = given if isinstance(given, dict) else None
        silent |= _special(tokenizer)
        defaults = tokenizer_files.sampling_defaults(files)
        return cls(tokenizer, silent, template, absence, ends, response_template, defaults)

    def decode(self, ids: Sequence[int], control_tokens: bool = False) -> str:
        """The text of ids, with or without the names of control tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=not control_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token within a text, which may be a part of a character; empty for an unused id."""
        if (known := self._token_bytes.get(token_id)) is None:
            known = self._token_bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        token = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._bytes:
            return bytes([int(token[3:-1], 16)])
        if self._spells_bytes and all(letter in _LETTERS for letter in token):
            return bytes(_LETTERS[letter] for letter in token)
        # A decoder may treat the first token of a sequence differently.
        once, twice = self._tokenizer.decode([token_id]), self._tokenizer.decode([token_id, token_id])
        return twice[len(once) :].encode()

    # The methods below raise TextTooLong for a text that surely has more than `limit` tokens; one that has a few more
    # may be returned whole. They take long for long texts and release the GIL: 3 MB of text take a second.

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer adds, such as a first one.

        Names of control tokens in the text are control tokens: a plain prompt writes its own format.
        """
        return _encode(self._tokenizer, text, limit, add_special_tokens=True)

    def encode_rendered(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a rendered conversation, whose special tokens the template has written."""
        return _encode(self._tokenizer, text, limit)

    def encode_chat(self, turns: Sequence[Turn], limit: int | None = None, tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of a conversation by its template, which alone writes control tokens.

        Raises TemplateRefusal where the template refuses the conversation, and ControlTokenInText.
        """
        if self.template is None:
            raise TemplateRefusal(self.template_absence)
        rendered = RenderedChat(self.template, turns, tools)
        marked = self._control.mark(self.template, rendered)
        if marked is None:
            return self.encode_rendered(rendered.text, limit)
        return self._control.real_ids(_encode(self._control.text_tokenizer, marked, limit))

    def encode_text(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a text without control tokens, also where it has their names. Raises ControlTokenInText."""
        if not self._control.are_in(text):
            return self.encode_rendered(text, limit)
        return self._control.real_ids(_encode(self._control.text_tokenizer, text, limit))

    def detokenizer(self, shown: Collection[int] = ()) -> Detokenizer:
        """A new detokenizer for one answer; special tokens have no text, but for those in `shown`."""
        if not shown:
            return Detokenizer(self._tokenizer.decode, self._silent, self._bytes)
        decode = partial(self._tokenizer.decode, skip_special_tokens=False)
        return Detokenizer(decode, self._silent.difference(shown), self._bytes)

    @cached_property
    def tool_syntax(self) -> ToolSyntax:
        """How the model calls tools. Raises TemplateRefusal where its template shows none."""
        if self.template is None:
            raise TemplateRefusal(self.template_absence)
        ends = [token for token, id in self.added_tokens.items() if id in self.end_tokens]
        return tool_syntax(self.template, ends, self.added_tokens, self._response_template)


def _encode(tokenizer: Tokenizer, text: str, limit: int | None, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text; one that is probably too long is encoded from its start, in parts of twice the length."""
    if limit is not None:
        end = CHARACTERS_PER_TOKEN * (limit + PART_MARGIN_TOKENS)
        while end < len(text):
            tokens = len(tokenizer.encode_batch_fast([text[:end]], add_special_tokens=False)[0].ids)
            if tokens > limit + PART_MARGIN_TOKENS:
                raise TextTooLong(tokens - PART_MARGIN_TOKENS)
            end *= 2
    # The one encoding call that releases the GIL.
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _tokenizer(files: Files) -> Tokenizer:
    if "tokenizer.json" not in files:
        raise Incompatible(f"the first shard sent no tokenizer.json, only: {', '.join(sorted(files)) or 'nothing'}")
    try:
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    # The library raises instances of Exception itself.
    except Exception as error:
        raise Incompatible(f"tokenizer.json can't be read: {error}") from error
    if not tokenizer.get_vocab_size():
        raise Incompatible("tokenizer.json has no token")
    if tokenizer_files.tokenizer_class(files) == "LlamaTokenizer" and b'"ByteLevel"' not in files["tokenizer.json"]:
        _split_as_llama(tokenizer, tokenizer_files.json_object(files, CONFIG))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = tokenizer_files.json_object(files, CONFIG).get("split_special_tokens") is True
    return tokenizer


def _split_as_llama(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """As `transformers.LlamaTokenizer`, which takes only tokens, merges and the post-processor of tokenizer.json."""
    prefix = config.get("add_prefix_space")
    spaced = prefix is None or bool(prefix)
    scheme = ("always" if config.get("legacy") else "first") if spaced else "never"
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _special(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _unused(tokenizer: Tokenizer) -> frozenset[int]:
    ids = frozenset(tokenizer.get_vocab().values())
    return frozenset(range(max(ids, default=0))) - ids


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens of bytes that the decoder puts together to characters."""
    if not _has_step(tokenizer, "ByteFallback"):
        return frozenset()
    return frozenset(id for token, id in tokenizer.get_vocab().items() if _BYTE.fullmatch(token))


def _has_step(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the decoder has a step of that type."""
    return tokenizer.decoder is not None and f'"{name}"'.encode() in tokenizer.decoder.__getstate__()


def _chat_template(files: Files, special: dict[str, str]) -> tuple[ChatTemplate | None, str]:
    source, absence = tokenizer_files.chat_template(files)
    try:
        return None if source is None else ChatTemplate(source, special), absence
    # Jinja has limits of its own that it does not check, such as the depth of an expression.
    except (TemplateError, RecursionError, ValueError) as error:
        raise Incompatible(f"the chat template can't be read: {error}") from error


def _end_tokens(files: Files, tokenizer: Tokenizer, named: str | None, template: ChatTemplate | None) -> list[int]:
    """Those that a configuration states, then the tokenizer's, then the one with which the template ends an answer."""
    ids = tokenizer.get_vocab()
    stated = tokenizer_files.end_tokens(files, max(ids.values()) + 1)
    own = [ids[token] for token in (named, _end_of_turn(tokenizer, template)) if token in ids]
    return list(dict.fromkeys([*stated, *own]))


def _end_of_turn(tokenizer: Tokenizer, template: ChatTemplate | None) -> str | None:
    """The added token that the template writes after an answer."""
    if template is None:
        return None
    turns = [Turn("user", "question"), Turn("assistant", _ANSWER), Turn("user", "question")]
    try:
        _, _, after = template.render(turns).partition(_ANSWER)
    except TemplateRefusal:
        return None
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return max((token for token in added if token and after.lstrip().startswith(token)), key=len, default=None)
