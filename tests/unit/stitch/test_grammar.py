"""Grammars are read within their limits, compile to compact JSON, and never take text for a control token."""

from __future__ import annotations

import json

import pytest

from stitch.errors import InvalidRequest
from stitch.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarCompiler, InvalidGrammar, json_value
from stitch.v1 import shard_pb2
from tests.support.byte_tokenizer import byte_tokenizer

COMPILER = GrammarCompiler(byte_tokenizer().to_str)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether the text, tokenized without control tokens, is a whole answer."""
    matcher = COMPILER.compile(grammar)
    ids = COMPILER.tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
def test_grammar_survives_its_message(kind: str) -> None:
    grammar = Grammar(kind, "[a-z]é")
    assert Grammar.from_proto(shard_pb2.Grammar.FromString(grammar.to_proto().SerializeToString())) == grammar


@pytest.mark.parametrize("message", [shard_pb2.Grammar(), shard_pb2.Grammar(regex="é" * (MAX_GRAMMAR_BYTES // 2 + 1))])
def test_grammar_without_source_or_over_its_limit_is_refused(message: shard_pb2.Grammar) -> None:
    with pytest.raises(InvalidRequest, match="grammar"):
        Grammar.from_proto(message)


@pytest.mark.parametrize("text", ['{"a":1,"b":"x y"}', '{"a": -12, "b": ""}', '{"a": 0,"b":"é\\n"}'])
def test_json_schema_accepts_what_validates(text: str) -> None:
    assert accepts(Grammar("json_schema", json.dumps(SCHEMA)), text)


@pytest.mark.parametrize(
    "text",
    ['{"a":  1,"b":"x"}', '{\n"a":1,"b":"x"}', ' {"a":1,"b":"x"}', '{"a":1,"b":"x"} ', '{"a":1}', '{"a":"1","b":""}'],
)
@pytest.mark.parametrize("own", [{}, {"x-guidance": {"whitespace_flexible": True}}])
def test_json_schema_refuses_other_values_and_runs_of_white_space(text: str, own: dict[str, object]) -> None:
    grammar = Grammar("json_schema", json.dumps({**SCHEMA, **own}))
    assert not accepts(grammar, text)
    assert not accepts(Grammar("lark", f"start: {json_value({**SCHEMA, **own})}"), text)


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("json_schema", '{"type": "fo', "Unterminated string"),
        ("json_schema", '{"type": "object"} {}', "Extra data"),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"type": "object", "unevaluatedProperties": false}', "Unimplemented"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "unevaluatedProperties": false}', "Unimplemented"),
        ("json_schema", '{"$ref": "http://example.org/schema"}', "does not fetch"),
        ("json_schema", "false", "Expecting object schema"),
        ("json_schema", '{"allOf": [{"multipleOf": 97}, {"multipleOf": 89.0}, {"multipleOf": 83}]}', "is 716,539"),
        ("json_schema", '{"multipleOf": 1e-5}', "is 100,000"),
        ("json_schema", '{"multipleOf": 1e999}', "inf"),
        ("lark", 'start: %json {"type": "integer", "multipleOf": 65537}', "is 65,537"),
        ("lark", 'start: %json {"type": "integer", "multipleOf": 7e4}', "is 70,000"),
        ("lark", 'start: %json {"type": "integer", "multiple\\u004ff": 65537}', "is 65,537"),
        ("lark", "start: %json # {}\n {}", "Expecting value"),
        ("json_schema", "[" * 100_000, "recursion"),
        ("regex", "a(", "unclosed group"),
        ("lark", "start: x", "unknown name"),
    ],
)
def test_invalid_grammar_is_refused_with_the_reason_in_one_line(kind: str, source: str, reason: str) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        COMPILER.compile(Grammar(kind, source))
    said = str(refused.value)
    assert reason in said
    assert said.isprintable()
    assert len(said) <= 200


def test_name_of_a_control_token_in_a_grammar_is_text() -> None:
    matcher = COMPILER.compile(Grammar("regex", "<\\|im_end\\|>!"))
    assert matcher.try_consume_tokens([2]) == 0
    assert accepts(Grammar("regex", "<\\|im_end\\|>!"), "<|im_end|>!")


def test_lark_names_a_control_token() -> None:
    matcher = COMPILER.compile(Grammar("lark", 'start: <|im_start|> "x"'))
    assert matcher.try_consume_tokens([1, byte_tokenizer().token_to_id("x")]) == 2


def test_matchers_of_one_grammar_are_independent() -> None:
    grammar = Grammar("regex", "ab")
    first, second = COMPILER.compile(grammar), COMPILER.compile(grammar)
    assert first.try_consume_tokens(COMPILER.tokenizer.tokenize_str("ab")) == 2
    assert not second.is_accepting()
