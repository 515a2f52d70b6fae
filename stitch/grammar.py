"""What an answer matches: a JSON schema, a regular expression or a grammar in Lark's notation.

In go a grammar's source and a tokenizer.json, out comes a matcher that knows the tokens that may come next. The gateway
compiles a grammar to refuse an invalid one, the last shard of a chain to mask logits, both within the same limits. Text
in a grammar is never a control token; a Lark grammar names these as `<name>` or `<[id]>`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from stitch.errors import InvalidRequest, plain
from stitch.v1 import shard_pb2

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_GRAMMAR_BYTES = 64 << 10
# The least common multiple of 95,000 takes a second to compile.
MAX_MULTIPLE = 20_000
# In a Lark grammar, before a JSON schema.
_EMBEDDED = re.compile(r"%json\s*")
MAX_REASON_CHARACTERS = 200
# Compiled ones, which take up to some MB each.
MAX_COMPILED = 64
# Without white space but for one space after a separator, so that no answer is an endless run of it. A keyword that is
# not known is refused instead of ignored.
JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ",[ ]?",
    "key_separator": ":[ ]?",
    "lenient": False,
}
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class InvalidGrammar(Exception):
    """A grammar that can't be compiled, or whose next tokens can't be computed, for the reason in its message."""

    def __init__(self, reason: str) -> None:
        super().__init__(plain(" ".join(reason.split()), MAX_REASON_CHARACTERS))


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar's source."""

    # A field of the message `Grammar`: `json_schema`, `regex` or `lark`.
    kind: str
    source: str

    @classmethod
    def from_proto(cls, message: shard_pb2.Grammar) -> Grammar:
        """The grammar of a message. Raises InvalidRequest for none, or one that is too long."""
        kind = message.WhichOneof("source")
        if kind is None:
            raise InvalidRequest("grammar", "not set", "it is a JSON schema, a regular expression or a Lark grammar")
        grammar = cls(kind, getattr(message, kind))
        if grammar.size_bytes > MAX_GRAMMAR_BYTES:
            raise InvalidRequest("grammar", f"{grammar.size_bytes:,} bytes", f"at most {MAX_GRAMMAR_BYTES:,}")
        return grammar

    def to_proto(self) -> shard_pb2.Grammar:
        return shard_pb2.Grammar(**{self.kind: self.source})

    @property
    def size_bytes(self) -> int:
        return len(self.source.encode())


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the latest ones; any thread may call it.

    The first call reads the tokenizer, which takes up to a second for a large one.
    """

    def __init__(self, tokenizer_json: Callable[[], str], tokens: int = 0) -> None:
        """`tokens`: the number of a model's logits, where that is more than the tokenizer has tokens."""
        self._tokenizer_json = tokenizer_json
        self._tokens = tokens
        self._tokenizer: LLTokenizer | None = None
        self._lock = Lock()
        self._compiled = lru_cache(MAX_COMPILED)(self._compile)

    @property
    def tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._tokenizer_json(), self._tokens)
            return self._tokenizer

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the start of an answer. Raises InvalidGrammar. Releases the GIL for most of its time."""
        return self._compiled(grammar).deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            source = _llguidance(grammar)
        except (ValueError, RecursionError) as error:
            raise InvalidGrammar(str(error)) from error
        matcher = LLMatcher(self.tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidGrammar(matcher.get_error())
        return matcher


def json_value(schema: object) -> str:
    """A JSON value of this schema, as a part of a Lark grammar."""
    given = schema if isinstance(schema, dict) else {"anyOf": [schema]}
    return f"%json {json.dumps({**given, 'x-guidance': JSON_OPTIONS})}"


def _llguidance(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            # The library's own parser accepts a surplus after the schema.
            _check_multiples(json.loads(grammar.source))
            return LLMatcher.grammar_from_json_schema(grammar.source, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case _:
            decoder = json.JSONDecoder()
            _check_multiples(
                [decoder.raw_decode(grammar.source, at.end())[0] for at in _EMBEDDED.finditer(grammar.source)]
            )
            return LLMatcher.grammar_from_lark(grammar.source)


def _check_multiples(content: object) -> None:
    """Raises ValueError where an automaton of remainders would be large: no limit of the library bounds its time."""
    given = {Fraction(repr(value)) for value in _multiples(content)}
    common = math.lcm(*(value.numerator for value in given)) * math.lcm(*(value.denominator for value in given))
    if not 0 < common <= MAX_MULTIPLE:
        raise ValueError(f"multipleOf: the least common multiple of all is {common:,}, and at most {MAX_MULTIPLE:,}")


def _multiples(content: object) -> Iterator[float]:
    """The values of `multipleOf` anywhere in JSON."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float):
                yield multiple
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _tokenizer(tokenizer_json: str, tokens: int) -> LLTokenizer:
    """A tokenizer that encodes text without control tokens: made of one that has the bytes of each token."""
    # Not at import: clients load no model library.
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer_json)
    plain = LLTokenizer(tokenizer_json, n_vocab=max(tokens, max(own.get_vocab().values()) + 1), slices=[])
    return LLTokenizer(TokenizerWrapper(_TextTokenizer(own, plain)))


class _TextTokenizer:
    """What `TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(self, own: Tokenizer, plain: LLTokenizer) -> None:
        ids = range(plain.vocab_size)
        self.eos_token_id = plain.eos_token
        self.tokens = [plain.decode_bytes([id]) for id in ids]
        self.special_token_ids = [id for id in ids if plain.is_special_token(id)]
        self._text = type(own)(own.model)
        for step in ("normalizer", "pre_tokenizer"):
            if (value := getattr(own, step)) is not None:
                setattr(self._text, step, value)

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return list(self._text.encode(text, add_special_tokens=False).ids)
